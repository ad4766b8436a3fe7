"""Run a score function on tensors without data, so that a wrong shape is told of by name, before anything is compiled."""

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hidrop_fx.errors import PassError
from hidrop_fx.methods.registry import Scorer
from hidrop_fx.surroundings import neutral_surroundings

# Sizes that no model has, and no two alike: a result is a score a token, or it is not.
_ROWS, _TOKENS, _QUERIES = 3, 1009, 11


@lru_cache(maxsize=64)
def check_score(
    scorer: Scorer,
    *,
    heads: int,
    key_heads: int,
    head_dim: int,
    value_dim: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    """Check that a score function returns one floating-point score for each token.

    Raises:
        PassError: it returns something else, or fails; names scorer, function and shapes.
    """
    tokens, queries = (_ROWS, _TOKENS), (_ROWS, _QUERIES)
    query, key = (_ROWS, heads, _QUERIES, head_dim), (_ROWS, key_heads, _TOKENS, head_dim)
    hidden = (*tokens, width)
    shapes = {
        "query": query,
        "key": key,
        "value": (*key[:3], value_dim),
        "hidden": hidden,
        "previous_hidden": hidden,
        "previous_query": query,
        "previous_key": key,
        "previous_value": (*key[:3], value_dim),
        "twig_query": query,
        "twig_key": key,
        "cos": (*tokens, head_dim),
        "sin": (*tokens, head_dim),
        "previous_cos": (*tokens, head_dim),
        "previous_sin": (*tokens, head_dim),
    }
    with neutral_surroundings(), FakeTensorMode():
        given = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        given["columns"] = torch.empty(tokens, dtype=torch.int64)
        given["is_vision"] = given["is_real"] = torch.empty(tokens, dtype=torch.bool)
        given["query_columns"] = torch.empty(queries, dtype=torch.int64)
        given["raters"] = torch.empty(queries, dtype=torch.float32)
        arguments = [1.0 if "scale" in name else given[name] for name in scorer.parameters]
        try:
            found = scorer.function(*arguments, **scorer.keywords)
        except Exception as error:  # whatever an operator raises that is given what it cannot take
            shown = {n: list(given[n].shape) for n in scorer.parameters if n in given}
            raise PassError(
                f"score={scorer.name!r}: {scorer} failed on tensors of shapes {shown}, B={_ROWS} rows and "
                f"S={_TOKENS} tokens: {type(error).__name__}: {error}"
            ) from error
    if isinstance(found, Tensor) and found.shape == tokens and found.is_floating_point():
        return
    got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
    raise PassError(
        f"score={scorer.name!r}: {scorer} returned {got} for B={_ROWS} rows of S={_TOKENS} tokens; return "
        f"floating-point scores [B, S], here {list(tokens)} (reduce heads with .mean(dim=1))"
    )
