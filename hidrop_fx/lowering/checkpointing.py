"""Gradient checkpointing of layer bodies, with one decoder layer as the unit, as in Hugging Face.

with recomputing(True):
    outputs = run_top(inputs)     # every `Recomputable` body keeps its inputs alone for backward
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hidrop_fx.lowering.layer_body import Body
from hidrop_fx.surroundings import in_dispatch_mode

_RECOMPUTE: ContextVar[bool] = ContextVar("recompute", default=False)


class Recomputable:
    """A layer body that recomputes its activations in backward while `recomputing` is on."""

    def __init__(self, body: Body) -> None:
        self.name = body.name
        self.body = body

    def __call__(self, *args: Tensor) -> Any:
        if _RECOMPUTE.get():
            # A body that runs uncompiled under a dispatch mode is recomputed as it ran, where that has ended.
            run = self.body.module.forward if in_dispatch_mode() else self.body
            return checkpoint(run, *args, use_reentrant=False)
        return self.body(*args)


@contextmanager
def recomputing(wanted: bool) -> Iterator[None]:
    """Switch the recomputation of `Recomputable` bodies on or off in this context."""
    token = _RECOMPUTE.set(wanted)
    try:
        yield
    finally:
        _RECOMPUTE.reset(token)
