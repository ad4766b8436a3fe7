"""Text features that a call's images are relevant to, in the place of its prompt's embeddings.

with given_features(model, features):           # `hidrop.relevant_to`
    given_text(model, rows=2, width=4096)       # fp32 [2, 4096]
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from hidrop_fx.errors import InputError

_GIVEN: ContextVar[Mapping[Any, Tensor]] = ContextVar(
    "hidrop_fx text features", default=MappingProxyType({})
)


@contextmanager
def given_features(model: Any, features: Any) -> Iterator[None]:
    """Let the calls of a model within the block, in this thread or task, know these features [D] or [B, D].

    Raises:
        InputError: they are of another kind.
    """
    if not isinstance(features, Tensor):
        raise InputError(
            f"text features are a {type(features).__name__}; pass a tensor [D], or [rows, D]"
        )
    if not features.is_floating_point() or features.dim() not in (1, 2):
        raise InputError(
            f"text features are {features.dtype} {list(features.shape)}; pass floats [D], or [rows, D]"
        )
    token = _GIVEN.set({**_GIVEN.get(), model: features})
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given_text(model: Any, *, rows: int, width: int) -> Tensor | None:
    """Return the given features of each row of a call, of length one, fp32 [B, D]; None where none were given.

    Raises:
        InputError: they are not as wide as image features, or those of another number of rows.
    """
    features = _GIVEN.get().get(model)
    if features is None:
        return None
    if features.shape[-1] != width:
        raise InputError(
            f"text features are {features.shape[-1]} wide, and image features {width}: project them to that space"
        )
    unit = normalize(features.detach().float(), dim=-1)
    if unit.dim() == 1:
        return unit.expand(rows, -1)
    if len(unit) == 0 or rows % len(unit):
        raise InputError(
            f"text features are those of {len(unit)} rows, and the call has {rows}: pass one for each row, or [D] for all"
        )
    return unit.repeat_interleave(rows // len(unit), dim=0)
