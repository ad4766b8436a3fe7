"""KV buffers at addresses that stay, which recorded graphs need; one cache at a time owns them.

    with pool.turn():
        pool.place(cache, spans)     # its layers move in, those of the owner before it are evicted
        ...                          # replay

Memory is laid out token by token, [S, B, G, d]: neither strides nor addresses depend on how many tokens there
is room for, and one allocation serves every batch size that fits.
"""

import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from hidrop_fx.lowering.shape_policy import ShapePolicy
from hidrop_fx.runtime.kv.layer import HidropLayer, views
from hidrop_fx.runtime.turn import Turn

logger = logging.getLogger("hidrop_fx")

_GROWTH = 1.5

Shape = tuple[int, ...]


class Owner(Protocol):
    """A cache whose layers' buffers may lie in a pool."""

    @property
    def layers(self) -> Sequence[HidropLayer]:
        """One for each decoder layer."""


class _Views:
    """The first places of a cache's buffers, and which buffers these were."""

    def __init__(self, cache: Owner, lengths: Mapping[str, int]) -> None:
        self.parts = views(cache.layers, lengths)
        self._lengths = lengths
        self._cache = weakref.ref(cache)
        self._buffers = [(layer.keys, layer.values) for layer in cache.layers]

    def serve(self, cache: Owner, lengths: Mapping[str, int]) -> bool:
        """Return True if they are what a cache needs now."""
        if self._cache() is not cache or self._lengths != lengths:
            return False
        for layer, (keys, values) in zip(cache.layers, self._buffers, strict=True):
            if layer.keys is not keys or layer.values is not values:
                return False
            if layer.cleared < lengths[layer.segment]:
                return False
        return True


class _Prompt:
    """The buffers of a prompt: the next one of its sizes is given the same tensors, which takes no operator."""

    def __init__(
        self, shapes: Mapping[str, Shape], like: Tensor, buffers: dict[str, Tensor]
    ) -> None:
        self.buffers = buffers
        self._shapes = shapes
        self._kind = like.dtype, like.device
        self._ends: list[int] = []
        self._parts: list[tuple[Tensor, Tensor]] = []

    def serve(self, shapes: Mapping[str, Shape], like: Tensor) -> bool:
        """Return True if they are what a prompt needs now."""
        return self._shapes == shapes and self._kind == (like.dtype, like.device)

    def parts(self, layers: Sequence[HidropLayer]) -> list[tuple[Tensor, Tensor]]:
        """Return the filled part of every layer's buffers, where the layers have these."""
        ends = [layer.filled for layer in layers]
        if ends != self._ends:
            self._parts, self._ends = views(layers), ends
        return self._parts


class KVPool:
    """The KV memory of one model's recorded graphs.

    Attributes:
        generation: counts how often an address changed, which every recording before it does not survive.
    """

    def __init__(self, shape_policy: ShapePolicy) -> None:
        self.generation = 0
        self.shape_policy = shape_policy
        self._storage: dict[str, Tensor] = {}
        self._owner: weakref.ref[Owner] | None = None
        self._owner_stream: Any = None
        self._views: _Views | None = None
        """The owner's, for as long as nothing moves: making them anew costs every token."""
        self._prompt: _Prompt | None = None
        self._turn = Turn()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVPool":
        """Return the pool itself: a copied cache acquires its buffers when its turn comes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave it out of a pickled cache, which is given the pool of a model that it is handed to."""
        return _none, ()

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(storage.nbytes for storage in self._storage.values())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let one thread at a time go on, and on CUDA one stream after the other."""
        with self._turn.taken(lambda: self._device):
            yield

    @property
    def _device(self) -> torch.device | None:
        return next((storage.device for storage in self._storage.values()), None)

    def admits(
        self, shapes: Mapping[str, Shape], like: Tensor, others: Mapping[str, Tensor]
    ) -> bool:
        """Return True if buffers of these [B, G, S, d], by name, have room here, or may be given some.

        Args:
            others: gives the dtype of those whose dtype is another than that of `like`.
        """
        if self._prompt is not None and self._prompt.serve(shapes, like):
            return True
        if all(self._fits(n, shape, others.get(n, like)) for n, shape in shapes.items()):
            return True
        return self.shape_policy.admit(
            f"a KV buffer of {list(max(shapes.values(), key=math.prod))}"
        )

    def acquire(
        self, cache: Owner, shapes: Mapping[str, Shape], like: Tensor, others: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return buffers [B, G, capacity, d] by name for a cache that begins; `shapes` have the least capacities."""
        self._own(cache, like.device)
        self._views = None
        if self._prompt is None or not self._prompt.serve(shapes, like):
            buffers = {n: self._buffer(n, s, others.get(n, like)) for n, s in shapes.items()}
            self._prompt = _Prompt(shapes, like, buffers)
        return self._prompt.buffers

    def prompt_parts(self, layers: Sequence[HidropLayer]) -> list[tuple[Tensor, Tensor]]:
        """Return the parts that a prefill fills of the buffers that were acquired last, for the layers that have them."""
        assert self._prompt is not None
        return self._prompt.parts(layers)

    def place(self, cache: Owner, lengths: Mapping[str, int]) -> list[tuple[Tensor, Tensor]] | None:
        """Move a cache's layers in, with room for so many tokens in those of each segment.

        Returns:
            Keys and values [B, G, length, d] of each layer; None where that would take larger
            buffers than there may be.
        """
        if self._views is not None and self._views.serve(cache, lengths):
            return self._views.parts
        if self._is_placed(cache, lengths):
            self._clear_room(cache, lengths)
            self._views = _Views(cache, lengths)
            return self._views.parts
        shapes, held = {}, {}
        for index, layer in enumerate(cache.layers):
            ends = layer.places(lengths[layer.segment])
            for (name, buffer), end in zip(_named(index, layer), ends, strict=True):
                shapes[name], held[name] = (*buffer.shape[:2], end, buffer.shape[3]), buffer
        if not self.admits(shapes, cache.layers[0].keys, held):
            return None
        self._own(cache, cache.layers[0].keys.device)
        self._views = None
        for index, layer in enumerate(cache.layers):
            keys, values = f"keys_{index}", f"values_{index}"
            ends = layer.places(layer.filled)
            layer.keys = self._moved(keys, layer.keys, ends[0], shapes[keys])
            layer.values = self._moved(values, layer.values, ends[1], shapes[values])
            layer.cleared = layer.filled
        self._clear_room(cache, lengths)
        return views(cache.layers, lengths)

    def release(self) -> None:
        """Free the memory; its owner keeps its contents."""
        with self.turn():
            self._evict()
            for storage in self._storage.values():
                _outlive_stream(storage)
            self._prompt = None
            self._storage.clear()
            self.generation += 1

    def _is_placed(self, cache: Owner, lengths: Mapping[str, int]) -> bool:
        """Return True if nothing has to move, as at most tokens of an answer."""
        if self._owner is None or self._owner() is not cache:
            return False
        for index, layer in enumerate(cache.layers):
            rooms = layer.places(lengths[layer.segment])
            for (name, buffer), room in zip(_named(index, layer), rooms, strict=True):
                place = self._storage.get(name)
                if place is None or place.data_ptr() != buffer.data_ptr() or buffer.shape[2] < room:
                    return False
        return True

    def _clear_room(self, cache: Owner, lengths: Mapping[str, int]) -> None:
        """Zero the room behind a cache's tokens, where those of earlier requests lie.

        A mask gives them no weight, but zero times an infinity or a NaN is NaN.
        """
        parts: list[Tensor] = []
        for index, layer in enumerate(cache.layers):
            begin, end = max(layer.filled, layer.cleared), lengths[layer.segment]
            if begin < end:
                # States have no room behind them.
                named = () if layer.places(begin) == layer.places(end) else _named(index, layer)
                for name, buffer in named:
                    token = buffer.shape[0] * buffer.shape[1] * buffer.shape[3]
                    parts.append(self._storage[name][begin * token : end * token])
                layer.cleared = end
        if parts:
            torch._foreach_zero_(parts)

    def _moved(self, name: str, buffer: Tensor, filled: int, shape: Shape) -> Tensor:
        place = self._buffer(name, shape, buffer)
        if place.data_ptr() != buffer.data_ptr():
            place[:, :, :filled].copy_(buffer[:, :, :filled])
        return place

    def _fits(self, name: str, shape: Shape, like: Tensor) -> bool:
        storage = self._storage.get(name)
        if storage is None or (storage.dtype, storage.device) != (like.dtype, like.device):
            return False
        return storage.numel() >= math.prod(shape)

    def _buffer(self, name: str, shape: Shape, like: Tensor) -> Tensor:
        if not self._fits(name, shape, like):
            self._allocate(name, math.prod(shape), like)
        batch, heads, _, width = shape
        storage = self._storage[name]
        token = batch * heads * width
        places = storage.numel() // token if token else shape[2]  # a layer may keep nothing
        # Token after token in memory; one operator, for each layer's two buffers in every prompt.
        return storage.as_strided((batch, heads, places, width), (heads * width, width, token, 1))

    def _allocate(self, name: str, numel: int, like: Tensor) -> None:
        known = self._storage.get(name)
        if known is not None and known.device == like.device:
            numel = max(numel, int(known.numel() * _GROWTH))
        if known is not None:
            _outlive_stream(known)
        self._prompt = None  # it would keep the memory
        with torch.inference_mode(False):
            self._storage[name] = torch.zeros(numel, dtype=like.dtype, device=like.device)
        self.generation += 1

    def _own(self, cache: Owner, device: torch.device) -> None:
        if self._owner is None or self._owner() is not cache:
            self._evict()
            self._owner = weakref.ref(cache)
            self._owner_stream = _stream_of(device)

    def _evict(self) -> None:
        """Move the owner's layers to memory of their own, of the current stream: theirs goes on with it."""
        cache = None if self._owner is None else self._owner()
        # The owner last: where memory ends in between, its layers still lie here, and must not be overwritten.
        for layer in () if cache is None else cache.layers:
            key_end, value_end = layer.places(layer.filled + 1)
            keys = layer.keys[:, :, :key_end].clone()
            values = layer.values[:, :, :value_end].clone()
            if self._owner_stream is not None:
                keys.record_stream(self._owner_stream)
                values.record_stream(self._owner_stream)
            layer.keys, layer.values = keys, values
        self._owner = self._owner_stream = self._views = None
        if cache is None:
            return
        if cache.layers:
            filled = max(layer.filled for layer in cache.layers)
            logger.debug("a cache of %d tokens was evicted from the KV pool", filled)


def _named(index: int, layer: HidropLayer) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    """Return the buffers of a layer with their names in a pool."""
    return (f"keys_{index}", layer.keys), (f"values_{index}", layer.values)


def _stream_of(device: torch.device) -> Any:
    """Return the current stream of a CUDA device; None for other devices."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _outlive_stream(storage: Tensor) -> None:
    """Let memory be reused after the current stream's work, which waited for all others', and not before.

    The stream that it was allocated on has not waited.
    """
    stream = _stream_of(storage.device)
    if stream is not None:
        storage.record_stream(stream)


def _none() -> None:
    """Return None, for what a pickle leaves out."""
