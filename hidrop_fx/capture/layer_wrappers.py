"""Wrappers of torch around decoder layers, which recompute or move what a layer keeps for backward.

    checkpoint_wrapper(layer), apply_activation_checkpointing(model, ...), accelerate's `activation_checkpointing`

They change no number. A decoder is traced without them; where it is run, its bodies recompute as
`gradient_checkpointing_enable()` has them do, and hooks on the wrappers, such as FSDP2's, run as they would.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

logger = logging.getLogger("hidrop_fx")

_HOME = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_INNER = "_checkpoint_wrapped_module"
PREFIX = f"{_INNER}."
"""What a wrapper adds to the names of the parameters inside it."""


def wrapped_chain(module: nn.Module) -> list[nn.Module]:
    """Return a module and what it wraps, from the outside in; the module alone if it is no wrapper."""
    kinds, found = _kinds("ActivationWrapper"), [module]
    while kinds and isinstance(found[-1], kinds):
        found.append(getattr(found[-1], _INNER))
    return found


def recomputes(module: nn.Module) -> bool:
    """Return True for a wrapper that recomputes what is inside it."""
    kinds = _kinds("CheckpointWrapper")
    return bool(kinds) and isinstance(module, kinds)


@contextmanager
def without_wrappers(decoder: nn.Module) -> Iterator[None]:
    """Put each wrapped module in the place of its wrappers, for the time of a trace."""
    undo: list[tuple[dict[str, Any], str, nn.Module]] = []
    try:
        for module in list(decoder.modules()):
            children: dict[str, Any] = module._modules
            for name, child in list(children.items()):
                chain = [] if child is None else wrapped_chain(child)
                if len(chain) > 1:
                    undo.append((children, name, child))
                    children[name] = chain[-1]
        yield
    finally:
        for children, name, child in reversed(undo):
            children[name] = child


def announce_offloading(decoder: nn.Module) -> None:
    """Log a line where activations were to be moved to the CPU, which a compiled decoder leaves where they are."""
    kinds = _kinds("OffloadWrapper")
    if kinds and any(isinstance(module, kinds) for module in decoder.modules()):
        logger.info(
            "offload_wrapper is around layers of the decoder: a compiled model keeps their activations on the device "
            "(checkpoint_wrapper, gradient_checkpointing_enable() and activation_memory_budget take effect)"
        )


def _kinds(name: str) -> tuple[type, ...]:
    """Return a class of wrappers; none while nothing has imported its module, so that there is no instance."""
    home = sys.modules.get(_HOME)
    return () if home is None else (getattr(home, name),)
