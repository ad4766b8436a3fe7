"""Run an executable on static buffers: captured once a entry of shapes, then replayed.

    inputs  --copy-->  static inputs  --replay-->  static outputs  --clone-->  outputs
    grads   --copy-->  static grads   --replay-->  static input and parameter grads

Inputs that are `fixed`, the KV buffers of an `KVPool`, have static addresses already and are not copied.

On CUDA a replay launches one CUDA graph; elsewhere it calls the same function again, so that buffers,
entries and gradients are exercised without a GPU. A graph of its own for the forward and one for the
backward, since autograd runs them apart; not cudagraph trees, which belong to one thread and break
under gradient accumulation.
"""

import logging
import operator
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hidrop_fx.errors import CacheError
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.shape_policy import ShapePolicy
from hidrop_fx.runtime.kv.pool import KVPool
from hidrop_fx.runtime.prepared_call import Key, PreparedCall

logger = logging.getLogger("hidrop_fx")

_WARM_UPS = 3

Outputs = dict[str, Tensor]


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
        # "thread_local": another thread may go on with other work meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = [value.detach() for value in self.function()]


class GraphEntry:
    """An executable, recorded for one set of shapes.

    Args: fixed: inputs at addresses that stay, which are read and written where they are.
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
        self._pending: Callable[[], Any] = _nothing
        attributes = _attributes(run)
        self._quantised = [value for value in attributes if is_traceable_wrapper_subclass(value)]
        self._plain = [v for v in attributes if not is_traceable_wrapper_subclass(v)]
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
    def kind(self) -> str:
        """For a log."""
        return f"{self._run.program.kind} graph"

    @property
    def run_id(self) -> int:
        """Of its executable."""
        return id(self._run)

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
        self._check_addresses(inputs)
        with torch.no_grad():
            for name in self.copied:
                self.inputs[name].copy_(inputs[name])
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
        found = list(map(Tensor.data_ptr, self._plain))
        return found + [part.data_ptr() for value in self._quantised for part in _parts(value)]

    def _check_addresses(self, inputs: dict[str, Tensor]) -> None:
        """A replay reads and writes where it did when it was recorded, whatever it is given."""
        for name in self.fixed:
            if inputs[name].data_ptr() != self.inputs[name].data_ptr():
                raise CacheError(
                    f"{name} of the cache is not where the {self._run.program.kind} graph was recorded; "
                    "buffers of a compiled model with cuda_graphs=True must not be replaced by hand"
                )

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
    """One forward and one backward of a entry, as autograd sees them."""

    @staticmethod
    def forward(ctx: Any, entry: GraphEntry, inputs: dict[str, Tensor], *sources: Tensor) -> Any:
        ctx.entry = entry
        outputs = entry.replay_forward(inputs)
        ctx.graph_alive = entry.await_backward()
        ctx.mark_non_differentiable(*[v for v in outputs.values() if not v.is_floating_point()])
        ctx.place = entry.output_names.index("hidden")
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.entry.replay_backward(grads[ctx.place])


class GraphRunner:
    """Buckets of executables, the least recently used of which are let go.

    Attributes:
        pool: the KV buffers that recordings of prefill and decode share.
        moved: how many recordings were lost to larger KV buffers.

    Args:
        capacity: how many entries are kept.
    """

    def __init__(self, log: CompileLog, shape_policy: ShapePolicy, capacity: int) -> None:
        self.entries: OrderedDict[Key, GraphEntry] = OrderedDict()
        self.pool = KVPool(shape_policy)
        self.log = log
        self.shape_policy = shape_policy
        self.capacity = capacity
        self.moved = 0
        self._pool: Any = None
        self._refused: dict[Key, Executable] = {}
        """Keys hold the id of an executable, which is taken by another once it is gone."""
        self._generation = 0

    def __call__(self, prepared: PreparedCall) -> Outputs:
        """Replay a prepared call; record it first where its key is new."""
        run, inputs, key = prepared.executable, prepared.tensors, prepared.key
        if any(other.busy for other in self.entries.values()):  # graphs of a pool share its memory
            logger.info(
                "a second forward before the first one's backward, whose output is still alive: it runs "
                "without a graph, whose buffers are still needed. Where no backward is to come, call "
                "under torch.no_grad()"
            )
            return run(inputs)
        entry = self._known(key, run)
        if entry is None:
            entry = self._new(key, run, inputs, prepared.buffers)
        if entry is None:
            return run(inputs)
        run.calls += 1
        return entry(inputs)

    def keep_only(self, runs: Iterable[Executable]) -> None:
        """Let go of what was recorded of all others, which holds on to their parameters."""
        kept = {id(run) for run in runs}
        self.entries = OrderedDict(
            (key, entry) for key, entry in self.entries.items() if entry.run_id in kept
        )
        self._refused = {key: run for key, run in self._refused.items() if id(run) in kept}

    def release(self) -> None:
        """Give the buffers back."""
        self.entries.clear()
        self.pool.release()
        self._pool = None

    def _known(self, key: Key, run: Executable) -> GraphEntry | None:
        self._forget_moved()
        entry = self.entries.get(key)
        if entry is not None and entry.stale:
            logger.info(
                "parameters moved in memory; the %s graph is recorded again", run.program.kind
            )
            entry = self.entries.pop(key) and None
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    def _forget_moved(self) -> None:
        """Drop what was recorded on KV buffers that have been replaced by larger ones."""
        if self._generation == self.pool.generation:
            return
        self._generation = self.pool.generation
        moved = [key for key, entry in self.entries.items() if entry.fixed]
        for key in moved:
            del self.entries[key]
        self.moved += len(moved)
        if moved:
            logger.log(
                logging.DEBUG if self.shape_policy.is_announced else logging.INFO,
                "the KV buffers were replaced by others: %d graphs are recorded again. To size them at once, call "
                "hidrop_fx.warmup with the largest shapes",
                len(moved),
            )

    def _new(
        self, key: Key, run: Executable, inputs: dict[str, Tensor], fixed: Collection[str]
    ) -> GraphEntry | None:
        """Record; None where that is not wanted, or not possible."""
        name, shapes = f"{run.program.kind} graph", _described(run, inputs)
        if key in self._refused or not self.shape_policy.admit(f"a {name} for {shapes}"):
            return None
        self.log.started(name, shapes)
        started = time.perf_counter()
        try:
            entry = self._record(run, inputs, fixed)
        except torch.AcceleratorError as error:
            self._refused[key] = run
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            logger.warning("the %s for %s runs without a graph: %s", name, shapes, reason)
            return None
        self.log.finished(name, shapes, time.perf_counter() - started)
        self.entries[key] = entry
        while len(self.entries) > self.capacity:
            _, oldest = self.entries.popitem(last=False)
            logger.info("a %s was let go: %d are kept", oldest.kind, self.capacity)
        return entry

    def _record(
        self, run: Executable, inputs: dict[str, Tensor], fixed: Collection[str]
    ) -> GraphEntry:
        cuda = next(iter(inputs.values())).is_cuda
        if cuda and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        grad = torch.is_grad_enabled()
        # A tensor made in inference mode could not be written to by a call outside it.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return GraphEntry(run, inputs, self._pool if cuda else None, fixed)


def _described(run: Executable, inputs: dict[str, Tensor]) -> str:
    """Shapes of what the entries differ by, and modes that are not those of `generate`."""
    shown = [
        f"{k} {list(v.shape)}" for k, v in inputs.items() if "embeds" in k or k == "pixel_values"
    ]
    cached = {int(v.shape[2]) for k, v in inputs.items() if k.startswith("keys_")}
    if cached:
        shown.append(f"KV {sorted(cached)}")
    if run.program.kind == "prefill":
        if "output_columns" not in run.inputs:
            shown.append("logits of every row")
        if torch.is_grad_enabled():
            shown.append("with gradients (torch.no_grad() leaves them out)")
    if torch.is_autocast_enabled(next(iter(inputs.values())).device.type):
        shown.append("under autocast")
    return ", ".join(shown)


def _attributes(run: Executable) -> list[Tensor]:
    """Parameters and buffers that a program reads."""
    module = run.program.module
    names = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
    found = (operator.attrgetter(name)(module) for name in names)
    return list({id(value): value for value in found}.values())


def _parts(value: Tensor) -> list[Tensor]:
    """The plain tensors that a quantised weight consists of."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]


def _trained_parameters(run: Executable) -> list[nn.Parameter]:
    return [p for p in _attributes(run) if isinstance(p, nn.Parameter) and p.requires_grad]


def _nothing() -> None:
    return None
