"""One executable, recorded for one set of shapes on static buffers.

    inputs  --copy-->  static inputs  --replay-->  static outputs  --clone-->  outputs
    grads   --copy-->  static grads   --replay-->  static input and parameter grads

A graph of its own for the forward and one for the backward, since autograd runs them apart; not cudagraph
trees, which belong to one thread and break under gradient accumulation.
"""

import operator
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hidrop_fx.errors import CacheError, HidropError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.runtime.cuda_graphs.recording import Recording

_WARM_UPS = 3

Outputs = dict[str, Tensor]


class GraphEntry:
    """An executable recorded for one set of shapes: forward, and backward where anything is differentiable.

    Args:
        inputs: shapes and values to record with.
        pool: CUDA graph memory pool; None where replays are plain calls.
        fixed: inputs at addresses that stay, as KV buffers: read and written where they lie, not copied.
    """

    def __init__(
        self,
        run: Executable,
        inputs: dict[str, Tensor],
        pool: Any,
        fixed: Collection[str] = (),
    ) -> None:
        self.names = [name for name in run.inputs if inputs[name].requires_grad]
        self.parameters = _trained_parameters(run) if torch.is_grad_enabled() else []
        self.inputs = {
            name: value
            if name in fixed
            else value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in inputs.items()
        }
        self.copied = [name for name in inputs if name not in fixed]
        self.fixed = [name for name in inputs if name in fixed]
        self.differentiable = bool(self.names or self.parameters)
        self._run = run
        self._live: Outputs = {}
        self.grad_outputs: Outputs = {}
        """Static gradients of the differentiable outputs."""
        self._pending: Callable[[], Any] = _nothing
        attributes = _attributes(run)
        self._quantised = [value for value in attributes if is_traceable_wrapper_subclass(value)]
        self._plain = [v for v in attributes if not is_traceable_wrapper_subclass(v)]
        self._addresses, self._frozen = self._where(), self._without_gradient()
        if pool is not None:
            self._warm_up()
        self.forward = Recording(self._forward, pool)
        self.output_names = list(self._live)
        if self.differentiable:
            self.backward = Recording(self._backward, pool)

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
        """True if parameters have moved in memory, or were frozen or released, since."""
        return self._addresses != self._where() or self._frozen != self._without_gradient()

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
            for name in self.copied:
                self.inputs[name].copy_(inputs[name])
        self.forward.replay()
        values = [value.clone() for value in self.forward.outputs]
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
        self._pending = _nothing
        for name, static in self.grad_outputs.items():
            grad = grads[name]
            if grad is None:
                static.zero_()
            else:
                static.copy_(grad)
        self.backward.replay()
        found = iter(self.backward.outputs)
        sources = [next(found) if used else None for used in self._used]
        count = len(self.names)
        # A parameter without a gradient takes the tensor that it is given for its own.
        owned = [True] * count + [p.grad is None for p in self.parameters]
        return [
            g.clone() if own and g is not None else g for g, own in zip(sources, owned, strict=True)
        ]

    def _forward(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.differentiable):
            self._live = self._run(self.inputs)
        if self.differentiable and not self.grad_outputs:
            self.grad_outputs = {
                name: torch.zeros_like(value)
                for name, value in self._live.items()
                if value.requires_grad
            }
        return list(self._live.values())

    def _backward(self) -> list[Tensor]:
        sources = [self.inputs[name] for name in self.names] + self.parameters
        outputs = [self._live[name] for name in self.grad_outputs]
        given = list(self.grad_outputs.values())
        grads = torch.autograd.grad(outputs, sources, given, allow_unused=True)
        self._used = [grad is not None for grad in grads]
        return [grad for grad in grads if grad is not None]

    def _where(self) -> list[int]:
        found = list(map(Tensor.data_ptr, self._plain))
        return found + [part.data_ptr() for value in self._quantised for part in _parts(value)]

    def _without_gradient(self) -> list[bool]:
        """Return which parameters the recorded backward leaves out; none of them where there is no backward."""
        if not torch.is_grad_enabled():
            return []
        return [not value.requires_grad for value in self._plain]

    def _check_addresses(self, inputs: dict[str, Tensor]) -> None:
        """Raise if a fixed input lies elsewhere than when it was recorded: a replay would not read it there."""
        for name in self.fixed:
            if inputs[name].data_ptr() != self.inputs[name].data_ptr():
                raise CacheError(
                    f"{name} of the cache is not where the {self._run.program.kind} graph was recorded; "
                    "buffers of a compiled model with cuda_graphs=True must not be replaced by hand"
                )

    def _warm_up(self) -> None:
        """Run some times on another stream, so that nothing is compiled and no kernel chosen while recording."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forward()
                if self.differentiable:
                    self._backward()
        torch.cuda.current_stream().wait_stream(side)


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


def _attributes(run: Executable) -> list[Tensor]:
    """Return the parameters and buffers that a program reads."""
    module = run.program.module
    names = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    found = (operator.attrgetter(name)(module) for name in names)
    return list({id(value): value for value in found}.values())


def _parts(value: Tensor) -> list[Tensor]:
    """Return the plain tensors that a quantised weight consists of."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]


def _trained_parameters(run: Executable) -> list[nn.Parameter]:
    return [p for p in _attributes(run) if isinstance(p, nn.Parameter) and p.requires_grad]


def _nothing() -> None:
    return None
