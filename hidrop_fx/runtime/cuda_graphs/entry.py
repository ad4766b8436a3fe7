"""One executable, recorded for one set of shapes on static buffers.

    inputs  --copy-->  static inputs  --replay-->  static outputs  --clone-->  outputs
    grads   --copy-->  static grads   --replay-->  static input and parameter grads

A graph of its own for the forward and one for the backward, since autograd runs them apart; not cudagraph
trees, which belong to one thread and break under gradient accumulation.
"""

import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hidrop_fx.errors import CacheError, HidropError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.runtime.cuda_graphs.capturing import Captures
from hidrop_fx.runtime.cuda_graphs.copies import Copies
from hidrop_fx.runtime.cuda_graphs.recording import Recording
from hidrop_fx.runtime.turn import Turn

_WARM_UPS = 3

Outputs = dict[str, Tensor]


class GraphEntry:
    """An executable recorded for one set of shapes: forward, and backward where anything is differentiable.

    The recording differentiates by aliases of the parameters: the same memory, but none of the hooks and of the
    AccumulateGrad nodes that the model, DDP or a loss of before hold, which belong to calls and not to a graph.

    Args:
        inputs: shapes and values to record with.
        captures: of the CUDA device; None where replays are plain calls.
        turn: of the calls whose graphs share a pool; backward notes in it what the next call waits for.
        fixed: inputs at addresses that stay, as KV buffers: read and written where they lie, not copied.
    """

    def __init__(
        self,
        run: Executable,
        inputs: dict[str, Tensor],
        captures: Captures | None,
        turn: Turn,
        fixed: Collection[str] = (),
    ) -> None:
        self.names = [name for name in run.inputs if inputs[name].requires_grad]
        self.parameters = run.trained_parameters if torch.is_grad_enabled() else []
        self.copied = [name for name in inputs if name not in fixed]
        self.fixed = [name for name in inputs if name in fixed]
        self.differentiable = bool(self.names or self.parameters)
        self._run = run
        self._turn = turn
        self._captures = captures
        self._device = next(iter(inputs.values())).device
        self._aliases = [_alias(parameter) for parameter in self.parameters]
        pairs = zip(self.parameters, self._aliases, strict=True)
        aliased = {id(own): alias for own, alias in pairs}
        self._aliased = run.with_tensors(aliased) if aliased else run
        self._live: Outputs = {}
        self.grad_outputs: Outputs = {}
        """Static gradients of the differentiable outputs."""
        self._pending: Callable[[], Any] = _nothing
        tensors = run.tensors
        self._quantised = [value for value in tensors if is_traceable_wrapper_subclass(value)]
        self._plain = [value for value in tensors if not is_traceable_wrapper_subclass(value)]
        self._addresses = self._where()
        self._fixed_at = [inputs[name].data_ptr() for name in self.fixed]
        # All that is static comes from one stream, so that it is freed for recordings alone.
        with nullcontext() if captures is None else captures.aside():
            self.inputs = {
                name: value
                if name in fixed
                else value.detach().clone().requires_grad_(value.requires_grad)
                for name, value in inputs.items()
            }
            with _restored([inputs[name] for name in run.updated_inputs]):
                if captures is not None:
                    self._warm_up()
                self.forward = Recording(self._forward, captures)
                if self.differentiable:
                    self.backward = Recording(self._backward, captures)
        self.output_names = list(self._live)
        self._statics = [self.inputs[name] for name in self.copied]
        self._copy_inputs = Copies(self._statics)
        self._copy_outputs = Copies(self.forward.outputs)

    def __del__(self) -> None:
        """Let nothing take the memory of static tensors, on the stream they come from, before the last replay ends.

        A capture, during which this may be collected, bears no such wait, and allocates from elsewhere.
        """
        captures = getattr(self, "_captures", None)
        if captures is not None and not captures.underway and not sys.is_finalizing():
            self._turn.wait(captures.stream)

    @property
    def kind(self) -> str:
        """Name for a log line."""
        return f"{self._run.program.kind} graph"

    @property
    def run_id(self) -> int:
        """Identity of its executable."""
        return id(self._run)

    @property
    def stale(self) -> bool:
        """True if parameters have moved in memory since."""
        return self._addresses != self._where()

    @property
    def busy(self) -> bool:
        """True while a backward may still come for what the static buffers hold."""
        return self._pending() is not None

    def __call__(self, inputs: dict[str, Tensor]) -> Outputs:
        if not self.differentiable:
            return self.replay_forward(inputs)
        sources = [inputs[name] for name in self.names] + self.parameters
        values = _Replay.apply(self, inputs, *sources)
        return dict(zip(self.output_names, values, strict=True))

    def replay_forward(self, inputs: dict[str, Tensor]) -> Outputs:
        """Compute the outputs of these inputs, detached."""
        self._check_addresses(inputs)
        with torch.no_grad():
            self._copy_inputs(self._statics, [inputs[name] for name in self.copied])
        self.forward.replay()
        values = self._copy_outputs.clone(self.forward.outputs)
        return dict(zip(self.output_names, values, strict=True))

    def await_backward(self) -> object:
        """Return an object to keep for as long as a backward may come."""
        token = _Token()
        self._pending = weakref.ref(token)
        return token

    def replay_backward(self, grads: Mapping[str, Tensor | None]) -> list[Tensor | None]:
        """Compute the gradients of the differentiable inputs, then of the parameters.

        Args:
            grads: of the differentiable outputs, by name; None counts as zero.
        """
        for name, static in self.grad_outputs.items():
            grad = grads[name]
            if grad is None:
                static.zero_()
            else:
                static.copy_(grad)
        self.backward.replay()
        found = iter(self.backward.outputs)
        sources = [next(found) if used else None for used in self._used]
        lent = [False] * len(self.names) + [_is_added_in_place(p) for p in self.parameters]
        kept = [
            g for g, is_lent in zip(sources, lent, strict=True) if g is not None and not is_lent
        ]
        copies = iter(Copies(kept).clone(kept))
        given = [
            g if g is None or is_lent else next(copies)
            for g, is_lent in zip(sources, lent, strict=True)
        ]
        self._turn.note(self._device)
        self._pending = _nothing  # last: other threads may replay from here on
        return given

    def _forward(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.differentiable):
            self._live = self._aliased(self.inputs)
        if self.differentiable and not self.grad_outputs:
            self.grad_outputs = {
                name: torch.zeros_like(value)
                for name, value in self._live.items()
                if value.requires_grad
            }
        return list(self._live.values())

    def _backward(self) -> list[Tensor]:
        sources = [self.inputs[name] for name in self.names] + self._aliases
        outputs = [self._live[name] for name in self.grad_outputs]
        given = list(self.grad_outputs.values())
        # As where `loss.backward()` stands: behind the autocast region that forward ran in.
        with torch.autocast(self._device.type, enabled=False):
            grads = torch.autograd.grad(outputs, sources, given, allow_unused=True)
        self._used = [grad is not None for grad in grads]
        return [grad for grad in grads if grad is not None]

    def _where(self) -> list[int]:
        found = list(map(Tensor.data_ptr, self._plain))
        return found + [part.data_ptr() for value in self._quantised for part in _parts(value)]

    def _check_addresses(self, inputs: dict[str, Tensor]) -> None:
        """Raise if a fixed input lies elsewhere than when it was recorded: a replay would not read it there."""
        found = [inputs[name].data_ptr() for name in self.fixed]
        if found == self._fixed_at:
            return
        for name, now, before in zip(self.fixed, found, self._fixed_at, strict=True):
            if now != before:
                raise CacheError(
                    f"{name} of the cache is not where the {self._run.program.kind} graph was recorded; "
                    "buffers of a compiled model with cuda_graphs=True must not be replaced by hand"
                )

    def _warm_up(self) -> None:
        """Run some times, so that nothing is compiled and no kernel chosen while recording."""
        for _ in range(_WARM_UPS):
            self._forward()
            if self.differentiable:
                self._backward()


class _Token:
    """An object that lives as long as the autograd graph that holds it."""


class _Replay(torch.autograd.Function):
    """One forward and one backward of an entry, as autograd sees them."""

    @staticmethod
    def forward(ctx: Any, entry: GraphEntry, inputs: dict[str, Tensor], *sources: Tensor) -> Any:
        ctx.entry = entry
        outputs = entry.replay_forward(inputs)
        ctx.graph_alive = entry.await_backward()
        constant = [v for name, v in outputs.items() if name not in entry.grad_outputs]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return tuple(outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        entry, ctx.entry = ctx.entry, None
        if entry is None:
            raise HidropError(
                "a second backward through one forward (retain_graph=True): a recorded graph keeps its "
                "activations for one. Add the losses up before, call forward again, or compile with "
                "cuda_graphs=False"
            )
        named = dict(zip(entry.output_names, grads, strict=True))
        return None, None, *entry.replay_backward(named)


def _alias(parameter: nn.Parameter) -> Tensor:
    """Return a leaf of its own over a parameter's memory."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach())


def _is_added_in_place(parameter: nn.Parameter) -> bool:
    """Return True if autograd adds what it is given to an existing gradient, and nobody else sees it."""
    if parameter.grad is None or parameter._backward_hooks:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad returns it instead
        return False


def _parts(value: Tensor) -> list[Tensor]:
    """Return the plain tensors that a quantised weight consists of."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]


@contextmanager
def _restored(states: list[Tensor]) -> Iterator[None]:
    """Put states back where runs that are none of the calls have taken them further."""
    before = [state.clone() for state in states]
    try:
        yield
    finally:
        with torch.no_grad():
            for state, value in zip(states, before, strict=True):
                state.copy_(value)


def _nothing() -> None:
    return None
