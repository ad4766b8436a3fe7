"""Refuse decoders whose layers let tokens see each other outside attention.

    weights = router(hidden).mean(dim=(0, 1))        # of all tokens: [experts]

A schedule leaves tokens out of layers. Where each token is computed for itself, and attention alone reads others,
the rest of them come out as they would; a mean over the tokens does not, and padding would be part of it, too.
"""

from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import describe, embeddings_of, module_path
from hidrop_fx.errors import CaptureError


def refuse_mixed_tokens(graph: fx.Graph) -> None:
    """Raise where a value that is computed from hidden states has lost the dimension of its rows or tokens.

    Seen are reductions over them; not, as for a convolution or a cumulative sum, what keeps their number. Integers are
    not followed.

    Raises:
        CaptureError: names the operator and its module.
    """
    hidden = embeddings_of(graph)
    sizes = [_symbols(size) for size in hidden.meta["val"].shape[:2]]
    followed = {hidden}
    for node in graph.nodes:
        if followed.isdisjoint(node.all_input_nodes):
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            if isinstance(value, (tuple, list)):
                followed.add(node)
            continue
        if not value.is_floating_point():
            continue  # a choice, such as that of experts: how many tokens made it changes no token
        followed.add(node)
        if 0 in [size for size in value.shape if type(size) is int]:
            continue  # no value, such as the rest behind a rotary embedding of the whole head
        present = _symbols(value.numel())
        if any(size and not size & present for size in sizes):
            stack = node.meta.get("nn_module_stack") or {}
            kind = str(list(stack.values())[-1][1]) if stack else ""
            raise CaptureError(
                f"{module_path(node) or 'the decoder'} ({kind}) computes one value of several tokens outside "
                f"attention: {describe(node)}. A schedule, and padding too, would change it for all of them"
            )


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()
