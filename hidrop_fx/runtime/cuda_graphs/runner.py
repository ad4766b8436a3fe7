"""Run prepared calls on recorded graphs: one entry for each key, the least recently used evicted.

On CUDA a replay launches one CUDA graph; elsewhere it calls the same function again, so that buffers,
entries and gradients are exercised without a GPU.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.shape_policy import ShapePolicy
from hidrop_fx.runtime.cuda_graphs.entry import GraphEntry, Outputs
from hidrop_fx.runtime.kv.pool import KVPool
from hidrop_fx.runtime.prepared_call import Key, PreparedCall

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
        """Evict the recordings of all other executables, which hold on to their parameters."""
        kept = {id(run) for run in runs}
        self.entries = OrderedDict(
            (key, entry) for key, entry in self.entries.items() if entry.run_id in kept
        )
        self._refused = {key: run for key, run in self._refused.items() if id(run) in kept}

    def release(self) -> None:
        """Evict all recordings, and give their buffers back."""
        self.entries.clear()
        self.pool.release()
        self._pool = None

    def _known(self, key: Key, run: Executable) -> GraphEntry | None:
        self._evict_moved()
        entry = self.entries.get(key)
        if entry is not None and entry.stale:
            logger.info(
                "parameters moved in memory, or were frozen or released; the %s graph is recorded again",
                run.program.kind,
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
        except torch.AcceleratorError as error:
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
        cuda = next(iter(inputs.values())).is_cuda
        if cuda and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        grad = torch.is_grad_enabled()
        # A tensor made in inference mode could not be written to by a call outside it.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return GraphEntry(run, inputs, self._pool if cuda else None, fixed)


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
