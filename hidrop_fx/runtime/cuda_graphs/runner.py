"""Run prepared calls on recorded graphs: one entry for each key, the least recently used evicted.

On CUDA a replay launches one CUDA graph; elsewhere it calls the same function again, so that buffers,
entries and gradients are exercised without a GPU. All graphs share one pool: a call waits for its turn, and what
cannot be recorded, or fails to be, runs plainly.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.shape_policy import ShapePolicy
from hidrop_fx.runtime.cuda_graphs.capturing import Captures
from hidrop_fx.runtime.cuda_graphs.entry import GraphEntry, Outputs
from hidrop_fx.runtime.kv.pool import KVPool
from hidrop_fx.runtime.prepared_call import Key, PreparedCall
from hidrop_fx.runtime.turn import Turn

logger = logging.getLogger("hidrop_fx")


class GraphRunner:
    """Recorded graphs of one model's calls, by key; the least recently used is evicted.

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
        self._captures: dict[torch.device, Captures] = {}
        self._turn = Turn()
        self._refused: dict[Key, Executable] = {}
        """Keys hold the id of an executable, which is taken by another once it is gone."""
        self._generation = 0

    def __call__(self, prepared: PreparedCall) -> Outputs:
        """Replay a prepared call; record it first where its key is new."""
        run, inputs = prepared.executable, prepared.tensors
        device = next(iter(inputs.values())).device
        with _on(device), _uncached_autocast(device.type):
            with self._turn.taken(lambda: device):
                entry = self._entry(prepared)
                if entry is not None:
                    run.calls += 1
                    return entry(inputs)
            return self._plainly(prepared)

    def keep_only(self, runs: Iterable[Executable]) -> None:
        """Evict the recordings of all other executables, which hold on to their parameters."""
        kept = {id(run) for run in runs}
        with self._turn.taken(_nowhere):
            self.entries = OrderedDict(
                (key, entry) for key, entry in self.entries.items() if entry.run_id in kept
            )
            self._refused = {key: run for key, run in self._refused.items() if id(run) in kept}

    def release(self) -> None:
        """Evict all recordings, and give their buffers back."""
        with self._turn.taken(_nowhere):
            self.entries.clear()
            self._captures.clear()
        self.pool.release()

    def _entry(self, prepared: PreparedCall) -> GraphEntry | None:
        """Return the recording that serves a call, made where there is none; None where there is to be none."""
        reason = _unrecordable()
        if any(other.busy for other in self.entries.values()):  # graphs of a pool share its memory
            reason = (
                "a second forward before the first one's backward, whose output is still alive: it runs "
                "without a graph, whose buffers are still needed. Where no backward is to come, call "
                "under torch.no_grad()"
            )
        if reason:
            logger.info(reason)
            return None
        run, inputs, key = prepared.executable, prepared.tensors, prepared.key
        return self._known(key, run) or self._new(key, run, inputs, prepared.buffers)

    def _plainly(self, prepared: PreparedCall) -> Outputs:
        """Run without a graph; what fails so as well is no fault of recording, which is tried again."""
        try:
            return prepared.executable(prepared.tensors)
        except Exception:
            self._refused.pop(prepared.key, None)
            raise

    def _known(self, key: Key, run: Executable) -> GraphEntry | None:
        self._evict_moved()
        entry = self.entries.get(key)
        if entry is not None and entry.stale:
            logger.info(
                "parameters moved in memory; the %s graph is recorded again", run.program.kind
            )
            entry = self.entries.pop(key) and None
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    def _evict_moved(self) -> None:
        """Evict what was recorded on KV buffers that have been replaced by larger ones."""
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
        """Record a graph; return None where that is not allowed, or not possible."""
        name, shapes = f"{run.program.kind} graph", _described(run, inputs)
        if key in self._refused or not self.shape_policy.admit(f"a {name} for {shapes}"):
            return None
        self.log.started(name, shapes)
        started = time.perf_counter()
        try:
            entry = self._record(run, inputs, fixed)
        except RuntimeError as error:  # all of CUDA's, and what PyTorch raises while it captures
            self._refused[key] = run
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            logger.warning("the %s for %s runs without a graph: %s", name, shapes, reason)
            return None
        self.log.finished(name, shapes, time.perf_counter() - started)
        self.entries[key] = entry
        while len(self.entries) > self.capacity:
            _, oldest = self.entries.popitem(last=False)
            logger.info("a %s was evicted: %d are kept", oldest.kind, self.capacity)
        return entry

    def _record(
        self, run: Executable, inputs: dict[str, Tensor], fixed: Collection[str]
    ) -> GraphEntry:
        device, captures = next(iter(inputs.values())).device, None
        if device.type == "cuda":
            captures = self._captures_on(device)
        grad = torch.is_grad_enabled()
        # A tensor made in inference mode could not be written to by a call outside it.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return GraphEntry(run, inputs, captures, self._turn, fixed)

    def _captures_on(self, device: torch.device) -> Captures:
        if device not in self._captures:
            self._captures[device] = Captures(device)
        return self._captures[device]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one: streams, events and captures are taken from there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _uncached_autocast(device: str) -> Iterator[None]:
    """Let autocast cast parameters anew: its copies are freed with the region, and know of no optimizer's step."""
    if not (torch.is_autocast_enabled(device) and torch.is_autocast_cache_enabled()):
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


def _unrecordable() -> str:
    """Return why nothing can be recorded, or replayed, in a mode that looks at every step of a backward."""
    if not torch.is_grad_enabled():
        return ""
    if torch.is_anomaly_enabled():
        return (
            "torch.autograd.detect_anomaly looks into every backward: the call runs without a graph"
        )
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(True) is not None:
        return "hooks on saved tensors (save_on_cpu, offloading): the call runs without a graph"
    return ""


def _nowhere() -> None:
    """Tell a turn that nothing ran."""


def _described(run: Executable, inputs: dict[str, Tensor]) -> str:
    """Return the shapes that entries differ by, and modes that are not those of `generate`, for a log."""
    shown = [
        f"{k} {list(v.shape)}" for k, v in inputs.items() if "embeds" in k or k == "pixel_values"
    ]
    cached = {int(inputs[name].shape[2]) for name in run.static_inputs}
    if cached:
        shown.append(f"KV {sorted(cached)}")
    if run.program.kind == "prefill":
        if run.program.variant.output == "all":
            shown.append("logits of every row")
        if torch.is_grad_enabled():
            shown.append("with gradients (torch.no_grad() leaves them out)")
    if torch.is_autocast_enabled(next(iter(inputs.values())).device.type):
        shown.append("under autocast")
    return ", ".join(shown)
