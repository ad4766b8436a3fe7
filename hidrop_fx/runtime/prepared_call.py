"""A call of the decoder with everything that it needs before the decoder runs.

    prepared = prepare_prompt(context, programs, capture, cache)
    prepared.tensors["text_embeds"]        # what the program is given
    output = run(prepared)

A tool may look at a prepared call without running it, or run it with another executable:
`run(dataclasses.replace(prepared, executable=...))`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.lowering.executable import Executable
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.program.variant import Kind, Variant
from hidrop_fx.runtime.call_context import DecodeContext, PromptContext
from hidrop_fx.runtime.kv.cache import HidropCache

Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedCall:
    """One call of the decoder, ready to run."""

    kind: Kind
    variant: Variant
    executable: Executable
    context: PromptContext | DecodeContext
    """Data that the tensors were filled from."""
    tensors: dict[str, Tensor]
    """Inputs of the executable by name, in its order."""
    cache: HidropCache | None = None
    recorded: bool = False
    """A CUDA graph of it is recorded, or replayed, where there is a graph runner."""
    recompute: bool = False
    """Layers compute their activations again in backward."""

    @property
    def layout(self) -> Layout | None:
        """Layout of a prompt; None in decode."""
        return self.context.layout if isinstance(self.context, PromptContext) else None

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the inputs that are read and written where they lie."""
        return self.executable.static_inputs

    @property
    def grad(self) -> bool:
        """True if the call is differentiable in the current grad mode."""
        constant = self.kind == "decode" and not self.variant.differentiable
        return not constant and torch.is_grad_enabled()

    @property
    def key(self) -> Key:
        """Executable and its state, modes, device and input signatures: calls that agree share one recorded graph."""
        values, grad = self.tensors.values(), self.grad
        device = next(iter(values)).device
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modes = grad, autocast, torch.are_deterministic_algorithms_enabled()
        state = self.executable.state(grad=grad)
        # Flat lists: there are two buffers a layer, and this is part of every decode step.
        shapes, dtypes = [value.shape for value in values], [value.dtype for value in values]
        differentiable = [value.requires_grad for value in values]
        return (id(self.executable), *modes, device, state, *shapes, *dtypes, *differentiable)
