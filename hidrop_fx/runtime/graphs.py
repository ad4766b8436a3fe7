"""Run an executable on static buffers: captured once a bucket of shapes, then replayed.

    inputs  --copy-->  static inputs  --replay-->  static outputs  --clone-->  outputs
    grads   --copy-->  static grads   --replay-->  static input and parameter grads

On CUDA a replay launches one CUDA graph; elsewhere it calls the same function again, so that buffers,
buckets and gradients are exercised without a GPU. A graph of its own for the forward and one for the
backward, since autograd runs them apart; not cudagraph trees, which belong to one thread and break
under gradient accumulation.
"""

import logging
import operator
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.lowering import CompileLog, Executable

logger = logging.getLogger("hidrop_fx")

_WARM_UPS = 3

Outputs = dict[str, Tensor]
_Key = tuple[Any, ...]


class Recording:
    """A function without arguments whose results land in the same tensors at every replay."""

    def __init__(self, function: Callable[[], Sequence[Tensor]], pool: Any) -> None:
        self.function = function
        self.outputs: list[Tensor] = []
        self._graph: Any = None
        self._record(pool)

    def replay(self) -> None:
        """Compute again, from what the function's inputs hold now."""
        if self._graph is not None:
            self._graph.replay()
            return
        for static, fresh in zip(self.outputs, self.function(), strict=True):
            static.copy_(fresh.detach())

    def _record(self, pool: Any) -> None:
        if pool is None:
            self.outputs = [value.detach().clone() for value in self.function()]
            return
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.outputs = [value.detach() for value in self.function()]


class Bucket:
    """An executable, recorded for one set of shapes."""

    def __init__(self, run: Executable, inputs: dict[str, Tensor], pool: Any) -> None:
        self.names = [name for name in run.inputs if inputs[name].requires_grad]
        self.parameters = _trained_parameters(run) if torch.is_grad_enabled() else []
        self.inputs = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in inputs.items()
        }
        self.differentiable = bool(self.names or self.parameters)
        self._run = run
        self._live: Outputs = {}
        self._pending: Callable[[], Any] = _nothing
        self._addresses = self._where()
        if pool is not None:
            self._warm_up()
        self.forward = Recording(self._forward, pool)
        self.output_names = list(self._live)
        self.grads: list[Tensor | None] = []
        if self.differentiable:
            self.grad_output = torch.zeros_like(self._live["hidden"])
            self.backward = Recording(self._backward, pool)

    @property
    def stale(self) -> bool:
        """Whether parameters have moved in memory since."""
        return self._addresses != self._where()

    @property
    def busy(self) -> bool:
        """Whether a backward is still to come for what the static buffers hold."""
        return self._pending() is not None

    def __call__(self, inputs: dict[str, Tensor]) -> Outputs:
        if not self.differentiable:
            return self.replay_forward(inputs)
        sources = [inputs[name] for name in self.names] + self.parameters
        values = _Replay.apply(self, inputs, *sources)
        return dict(zip(self.output_names, values, strict=True))

    def replay_forward(self, inputs: dict[str, Tensor]) -> Outputs:
        with torch.no_grad():
            for name, static in self.inputs.items():
                static.copy_(inputs[name])
        self.forward.replay()
        values = [value.clone() for value in self.forward.outputs]
        return dict(zip(self.output_names, values, strict=True))

    def await_backward(self) -> object:
        """Something to keep for as long as a backward may come."""
        token = _Token()
        self._pending = weakref.ref(token)
        return token

    def replay_backward(self, grad_output: Tensor) -> list[Tensor | None]:
        """Gradients of the differentiable inputs, then of the parameters."""
        self._pending = _nothing
        self.grad_output.copy_(grad_output)
        self.backward.replay()
        found = iter(self.backward.outputs)
        grads = [next(found) if used else None for used in self._used]
        count = len(self.names)
        # A parameter without a gradient takes the tensor that it is given for its own.
        owned = [True] * count + [p.grad is None for p in self.parameters]
        return [
            g.clone() if own and g is not None else g for g, own in zip(grads, owned, strict=True)
        ]

    def _forward(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.differentiable):
            self._live = self._run(self.inputs)
        return list(self._live.values())

    def _backward(self) -> list[Tensor]:
        sources = [self.inputs[name] for name in self.names] + self.parameters
        grads = torch.autograd.grad(
            self._live["hidden"], sources, self.grad_output, allow_unused=True
        )
        self._used = [grad is not None for grad in grads]
        return [grad for grad in grads if grad is not None]

    def _where(self) -> list[int]:
        top = self._run.top
        names = [str(n.target) for n in top.graph.nodes if n.op == "get_attr"]
        return [operator.attrgetter(name)(top).data_ptr() for name in names]

    def _warm_up(self) -> None:
        """Compile and choose kernels outside the capture, on another stream."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forward()
                if self.differentiable:
                    self.grad_output = torch.zeros_like(self._live["hidden"])
                    self._backward()
        torch.cuda.current_stream().wait_stream(side)


class _Token:
    """Lives as long as the autograd graph that holds it."""


class _Replay(torch.autograd.Function):
    """One forward and one backward of a bucket, as autograd sees them."""

    @staticmethod
    def forward(ctx: Any, bucket: Bucket, inputs: dict[str, Tensor], *sources: Tensor) -> Any:
        ctx.bucket = bucket
        outputs = bucket.replay_forward(inputs)
        ctx.graph_alive = bucket.await_backward()
        ctx.mark_non_differentiable(*[v for v in outputs.values() if not v.is_floating_point()])
        ctx.place = bucket.output_names.index("hidden")
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.bucket.replay_backward(grads[ctx.place])


class GraphRunner:
    """Buckets of executables, the least recently used of which are let go.

    Args:
        capacity: how many buckets are kept.
    """

    def __init__(self, log: CompileLog, capacity: int = 16) -> None:
        self.buckets: OrderedDict[_Key, Bucket] = OrderedDict()
        self.log = log
        self.capacity = capacity
        self._pool: Any = None

    def __call__(self, run: Executable, inputs: dict[str, Tensor]) -> Outputs:
        key = (id(run), *_modes(inputs), *map(_signature, inputs.values()))
        bucket = self.buckets.get(key)
        if bucket is not None and bucket.stale:
            logger.info(
                "parameters moved in memory; the %s graph is recorded again", run.program.kind
            )
            bucket = self.buckets.pop(key) and None
        if any(other.busy for other in self.buckets.values()):  # graphs of a pool share its memory
            logger.info(
                "a second forward before the first one's backward: it runs without a graph, whose "
                "buffers are still needed"
            )
            return run(inputs)
        if bucket is None:
            bucket = self._record(run, inputs)
            self.buckets[key] = bucket
            while len(self.buckets) > self.capacity:
                self.buckets.popitem(last=False)
        self.buckets.move_to_end(key)
        run.calls += 1
        return bucket(inputs)

    def release(self) -> None:
        """Give the buffers back."""
        self.buckets.clear()
        self._pool = None

    def _record(self, run: Executable, inputs: dict[str, Tensor]) -> Bucket:
        cuda = next(iter(inputs.values())).is_cuda
        if cuda and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        name = f"{run.program.kind} graph"
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in inputs.items() if "embeds" in k)
        self.log.started(name, shapes)
        started = time.perf_counter()
        bucket = Bucket(run, inputs, self._pool if cuda else None)
        self.log.finished(name, shapes, time.perf_counter() - started)
        return bucket


def _modes(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    kind = next(iter(inputs.values())).device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), autocast


def _signature(value: Tensor) -> tuple[Any, ...]:
    return (tuple(value.shape), value.dtype, value.requires_grad)


def _trained_parameters(run: Executable) -> list[nn.Parameter]:
    names = dict.fromkeys(str(n.target) for n in run.top.graph.nodes if n.op == "get_attr")
    found = {id(p): p for p in (operator.attrgetter(name)(run.top) for name in names)}
    return [p for p in found.values() if isinstance(p, nn.Parameter) and p.requires_grad]


def _nothing() -> None:
    return None
