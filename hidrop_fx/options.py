"""The options of `compile`: everything beside the model and its schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hidrop_fx.errors import HidropError
from hidrop_fx.lowering.shape_policy import ON_NEW_SHAPE
from hidrop_fx.ops.packed_attention import ATTENTIONS
from hidrop_fx.pipeline.custom_passes import checked_passes
from hidrop_fx.program.pass_function import Pass
from hidrop_fx.schedule.keeps import checked_int

__all__ = ["BACKENDS", "LOWERINGS", "Options"]

BACKENDS: tuple[str, ...] = ("inductor", "aot_eager", "eager")
LOWERINGS: tuple[str, ...] = ("bodies", "whole")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword arguments of `hidrop_fx.compile`, documented and validated here.

    Raises:
        HidropError: a value is not one of those documented.
        PassError: `passes` holds an object that is no pass.
    """

    backend: str = "inductor"
    """"inductor"; "aot_eager" (AOTAutograd without code generation) and "eager" (the rewritten graph,
    uncompiled) rule a stage out when something is wrong."""
    lowering: str | None = None
    """"bodies" compiles equal layers once, "whole" the program as one graph. None takes what measured best:
    bodies for prefill, whole for decode."""
    attention: str = "sdpa"
    """Attention kernel of prefill and training: "sdpa", PyTorch's choice but for cuDNN's kernels, which build a
    plan for every new shape; on CUDA in 16 bit also "cudnn", which lets those in where graphs are captured and
    shapes are fixed, and "varlen" (PyTorch) and "flash_attn" (the package), which spend nothing on the padding
    of a batch. Layers with a sliding window that matters, and attention dropout, keep "sdpa"."""
    activation_memory_budget: float | None = None
    """In training, the share in (0, 1] of a layer's activations that AOTAutograd keeps for backward; the rest
    is computed again (PyTorch's option of this name). None leaves PyTorch's own."""
    fused_loss: bool = False
    """In training with labels, head and loss take the supervised rows some at a time, so that the logits are never there
    all at once; `output.logits` is then None. A model whose `loss_function` is its own, sharded models and float16 make
    them all the same, and log a line."""
    cuda_graphs: bool = False
    """Capture prefill, decode, and forward and backward of training, once for each set of shapes, on static
    buffers, and replay the captures. On a CPU the same runner makes plain calls."""
    bucket_multiple: int = 64
    """With `cuda_graphs`, text is padded to a multiple of this many tokens, and images too where they vary
    in size, so that few sets of shapes occur."""
    max_graphs: int = 64
    """Captures that are kept; the least recently used one is evicted first."""
    on_new_shape: str = "compile"
    """Policy for a call that would have to be compiled or captured first: "compile" does so, "eager" runs it
    uncompiled and logs a line, "error" raises an `InputError`. `hidrop_fx.warmup` compiles and captures ahead."""
    overlap_vision: bool | None = None
    """Run the vision tower beside the layers before the injection, on a side stream, where all images have
    one size. None does so on CUDA. On a CPU the tower runs first."""
    passes: Sequence[Pass] = ()
    """Custom passes, `def my_pass(program, plan) -> PassResult`. They run in this order in every program
    (`program.kind` names its kind), after the built-in passes that decide on tokens and before those that
    decide how attention runs. What they add to `program.returns` is in the output's `pass_outputs`. See
    docs/passes.md."""

    def __post_init__(self) -> None:
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("lowering", self.lowering, (*LOWERINGS, None))
        _check_choice("attention", self.attention, ATTENTIONS)
        _check_choice("on_new_shape", self.on_new_shape, ON_NEW_SHAPE)
        _check_choice("cuda_graphs", self.cuda_graphs, (True, False))
        _check_choice("fused_loss", self.fused_loss, (True, False))
        _check_choice("overlap_vision", self.overlap_vision, (True, False, None))
        _check_share("activation_memory_budget", self.activation_memory_budget)
        object.__setattr__(self, "passes", checked_passes(self.passes))
        for name in ("bucket_multiple", "max_graphs"):
            object.__setattr__(self, name, checked_int(getattr(self, name), name, minimum=1))


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # Types are compared too: 1 is not taken for True.
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
