"""The options of `compile`: everything beside the model and its schedule."""

from dataclasses import dataclass
from typing import Any

from hidrop_fx.errors import HidropError
from hidrop_fx.lowering.shape_policy import ON_NEW_SHAPE
from hidrop_fx.ops.packed_attention import ATTENTIONS
from hidrop_fx.program.program import Pass
from hidrop_fx.schedule.schedule import checked_int

__all__ = ["BACKENDS", "LOWERINGS", "Options"]

BACKENDS: tuple[str, ...] = ("inductor", "aot_eager", "eager")
LOWERINGS: tuple[str, ...] = ("bodies", "whole")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword arguments of `hidrop_fx.compile`, checked.

    Raises: HidropError: a value is none of those that there are.
    """

    backend: str = "inductor"
    lowering: str | None = None
    """"bodies" or "whole"; None for what measured best: bodies for prefill, whole for decode."""
    attention: str = "sdpa"
    """Kernel of prefill and training, one of `ATTENTIONS`."""
    activation_memory_budget: float | None = None
    """Share of the activations that AOTAutograd may keep for backward; None leaves PyTorch's own."""
    cuda_graphs: bool = False
    bucket_multiple: int = 64
    """Where graphs are recorded, lengths are rounded up to a multiple of so many tokens."""
    max_graphs: int = 64
    """Recorded graphs that are kept."""
    on_new_shape: str = "compile"
    """What `ShapePolicy` does."""
    overlap_vision: bool | None = None
    """Whether the vision tower runs beside the text-only layers; None: on CUDA."""
    passes: tuple[Pass, ...] = ()
    """Of the user, in order."""

    def __post_init__(self) -> None:
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("lowering", self.lowering, (*LOWERINGS, None))
        _check_choice("attention", self.attention, ATTENTIONS)
        _check_choice("on_new_shape", self.on_new_shape, ON_NEW_SHAPE)
        _check_choice("cuda_graphs", self.cuda_graphs, (True, False))
        _check_choice("overlap_vision", self.overlap_vision, (True, False, None))
        _check_share("activation_memory_budget", self.activation_memory_budget)
        for name in ("bucket_multiple", "max_graphs"):
            object.__setattr__(self, name, checked_int(getattr(self, name), name, minimum=1))


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # 1 is no True here: who passes a number means something else.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        named = [choice if isinstance(choice, str) else repr(choice) for choice in choices]
        shown = ", ".join(named[:-1]) + f", or {named[-1]}" if None in choices else ", ".join(named)
        raise HidropError(f"{name}={value!r}; use one of {shown}")


def _check_share(name: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 < value <= 1):
        raise HidropError(f"{name}={value!r}; use a share in (0, 1], or None")
