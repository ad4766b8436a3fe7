"""CUDA graphs as lists of operators on fixed storages, with the memory of a shared pool."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.support.simulated_cuda.storages import (
    WILD,
    device_index,
    state_of,
    storage_key,
    unwatched,
)
from tests.support.simulated_cuda.streams import CAPTURES, Generator, Stream, current_stream, use

aten = torch.ops.aten

GENERATORS = tuple(Generator() for _ in range(2))

_recording: dict[Any, int] = {}
"""Pools that a capture allocates from, and its device."""

_in_pool: dict[Any, list[weakref.ref[SimulatedGraph]]] = {}
_pools = count(1)

HOST_WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
    "equal", "is_nonzero", "bincount", "histc", "argwhere", "nonzero_numpy", "allclose",
}  # fmt: skip
"""Operators that wait for the device."""

_INDEXING = {
    "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put",
}  # fmt: skip
_UNFILLED = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)


def graph_pool_handle() -> tuple[int, int]:
    return (0, next(_pools))


def end_allocate_to_pool(device: int, pool: Any) -> None:
    """torch._C._cuda_endAllocateToPool."""
    if _recording.pop(pool, None) is None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")


def empty_cache() -> None:
    if _recording.keys() - {capture.pool_id for capture in CAPTURES}:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


class _Place:
    """A tensor by its storage: strong where the graph owns it, weak where it does not."""

    def __init__(self, value: Tensor, graph: SimulatedGraph) -> None:
        storage = value.untyped_storage()
        self.key = storage._cdata
        self.spec = value.storage_offset(), tuple(value.shape), tuple(value.stride())
        self.dtype = value.dtype
        self.weak = None if self.key in graph.owned else storage._weak_ref()
        self.text = f"{value.dtype} {list(value.shape)}"

    def find(self, graph: SimulatedGraph, operator: Any) -> Tensor:
        if self.weak is None:
            storage = graph.owned[self.key]
        else:
            storage = torch.UntypedStorage._new_with_weak_ptr(self.weak)
            if storage is None:
                raise RuntimeError(
                    f"a replay reads memory that was freed: {self.text} of {operator}"
                )
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.spec)


class SimulatedGraph:
    """torch.cuda.CUDAGraph.

    Attributes:
        calls: operators with their arguments, and the places of their results.
        owned: storages that the capture allocated.
        outside: other storages that it uses, and whether it writes to them.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.owned: dict[int, torch.UntypedStorage] = {}
        self.outside: dict[int, tuple[Any, bool]] = {}
        self.forked: list[Stream] = []
        self.underway = self.done = False
        self.broken = ""
        self.pool_id: Any = None
        self.thread: int | None = None
        self._before: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._spared: set[int] = set()

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        self.stream = current_stream()
        if self.stream.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.pool_id = pool or graph_pool_handle()
        if self.pool_id in _recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        _recording[self.pool_id] = self.stream.device.index
        GENERATORS[self.stream.device.index].captured = True
        self.underway = True
        self.stream.capture = self
        CAPTURES.append(self)

    def invalidate(self, why: str) -> None:
        """Note the first thing that a capture does not bear."""
        self.broken = self.broken or why

    def own(self, value: Tensor) -> None:
        """Take a new storage into the pool."""
        storage = value.untyped_storage()
        storage._simulated.owner = self
        self.owned[storage._cdata] = storage

    def capture_end(self) -> None:
        if current_stream() is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        loose = [s for s in self.forked if not self.stream.knows(s, s.now)]
        self.underway = False
        for stream in (self.stream, *self.forked):
            stream.capture = None
        CAPTURES.remove(self)
        with unwatched():
            for storage, content in self._before.values():
                torch.empty(0, dtype=torch.uint8).set_(storage).copy_(content)
        self._before.clear()
        if self.broken or loose:
            from tests.support.simulated_cuda import streams

            if not streams.GENERATOR_STAYS_CAPTURED:
                GENERATORS[self.stream.device.index].captured = False
            why = self.broken or "unjoined work"
            raise torch.AcceleratorError(
                f"CUDA error: operation failed due to a previous error during capture ({why})"
            )
        GENERATORS[self.stream.device.index].captured = False
        del _recording[self.pool_id]
        self._spared = {key for other in self._others() for key in other.owned if _is_held(key)}
        _in_pool.setdefault(self.pool_id, []).append(weakref.ref(self))
        self.done = True
        for storage in self.owned.values():
            state = storage._simulated
            state.stale, state.writer, state.readers = "captured, not replayed", None, {}

    def replay(self) -> None:
        if not self.done:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        here = current_stream(self.stream.device)
        with unwatched():
            for operator, args, kwargs, places in self.calls:
                self._run(operator, args, kwargs, places)
        here.advance()
        for storage in self.owned.values():
            use(storage._simulated, here, True, "a replay")
        for weak, written in self.outside.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(weak)
            if storage is not None and getattr(storage, "_simulated", None) is not None:
                use(storage._simulated, here, written, "a replay")
        for other in self._others():
            for key, storage in other.owned.items():
                if other is not self and key not in self._spared:
                    storage._simulated.stale = (
                        "overwritten by the replay of another graph of its pool"
                    )

    def reset(self) -> None:
        self.calls, self.done = [], False

    def pool(self) -> Any:
        return self.pool_id

    def register_generator_state(self, *_: Any) -> None:
        """Do nothing: random numbers are drawn anew by every replay."""

    # While it is captured.

    def refuse(self, operator: Any, tensors: list[Tensor], name: str) -> None:
        """Raise if an operator cannot be captured."""
        by_mask = name in _INDEXING and any(
            v.dtype in (torch.bool, torch.uint8) for v in tensors[1:]
        )
        if name in HOST_WAITS or by_mask:
            self.invalidate(name)
            raise torch.AcceleratorError(
                f"CUDA error: operation not permitted when stream is capturing (aten::{name})"
            )

    def keep(self, value: Tensor) -> None:
        """Keep what an operator is about to overwrite outside the pool: nothing is computed now."""
        storage = value.untyped_storage()
        if storage._cdata not in self.owned and storage._cdata not in self._before:
            with unwatched():
                content = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
            self._before[storage._cdata] = (storage, content)

    def add(
        self, operator: Any, args: Any, kwargs: Any, result: Any, written: list[Tensor]
    ) -> None:
        """Enter an operator that ran."""

        def to_place(value: Tensor) -> Any:
            if device_index(value) in (None, WILD) and value.dim() == 0:
                with unwatched():
                    return value.clone()  # a number of the host is an argument of the kernel
            return _Place(value, self)

        inputs = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        outputs = [v for v in tree_flatten(result)[0] if isinstance(v, Tensor)]
        given = {storage_key(v) for v in inputs}
        is_view = not written and outputs and all(storage_key(v) in given for v in outputs)
        if is_view or operator._overloadpacket in _UNFILLED:
            return
        places = [None if storage_key(v) in given else _Place(v, self) for v in outputs]
        places += [_Place(v, self) for v in written if storage_key(v) in self.owned]
        self.calls.append((operator, *tree_map_only(Tensor, to_place, (args, kwargs)), places))

    def _others(self) -> list[SimulatedGraph]:
        found = (ref() for ref in _in_pool.get(self.pool_id, []))
        return [graph for graph in found if graph is not None and graph is not self]

    def _run(self, operator: Any, args: Any, kwargs: Any, places: list[Any]) -> None:
        def read(place: _Place) -> Tensor:
            return self._read(place, operator)

        args, kwargs = tree_map_only(
            _Place, read, (args, kwargs), is_leaf=lambda v: isinstance(v, _Place)
        )
        results = [v for v in tree_flatten(operator(*args, **kwargs))[0] if isinstance(v, Tensor)]
        for index, place in enumerate(places):  # of results, then of what was written in place
            if place is None:
                continue
            if index < len(results):
                target = place.find(self, operator)
                if target.data_ptr() != results[index].data_ptr():
                    target.copy_(results[index])
            if (storage := self.owned.get(place.key)) is not None:
                storage._simulated.stale = ""

    def _read(self, place: _Place, operator: Any) -> Tensor:
        value = place.find(self, operator)
        state = state_of(value)
        if state is not None and state.stale and state.owner is not self:
            raise RuntimeError(f"a replay reads {place.text} for {operator}: {state.stale}")
        return value


def _is_held(key: int) -> bool:
    """Return True if something outside still refers to a storage of a graph."""
    return torch._C._storage_Use_Count(key) > 1
