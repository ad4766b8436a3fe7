"""The KV cache of a compiled model, behind the `Cache` that transformers expects.

    cache = HidropCache(max_length=800)
    model(**inputs, past_key_values=cache)     # prefill fills it, decode appends
    cache.layers[20].filled                    # tokens that layer 20 holds
    cache.log.columns["prune_18"]              # and where in the prompt they stood

Every decoder layer of a rewritten model has seen another number of tokens. Its buffer holds exactly
those, and room for the tokens to come.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from hidrop_fx.capture.regions import KVShape, StateShape
from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.ops.columns import rounded_up
from hidrop_fx.planning import Plan
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.program.inputs import KVBuffers
from hidrop_fx.runtime.kv.layer import HidropLayer, RecurrentLayer, views, went_on
from hidrop_fx.runtime.kv.pool import KVPool, Shape
from hidrop_fx.runtime.kv.token_log import TokenLog

logger = logging.getLogger("hidrop_fx")

# Tokens that a new buffer has room for behind its prompt, however many may come.
_ROOM = 256


class HidropCache(Cache):
    """The KV cache of a compiled model; `generate` and `forward` make it.

    `get_seq_length()` is the logical length: prompt columns, padding and images included, plus the
    tokens generated since. `get_seq_length(k)` is what layer k really holds.

    Attributes:
        log: columns and position ids of the tokens that it holds.
        speculative: a draft comes along with the prompt, as in assisted decoding.
        copies: of each row that generate made for beams or several answers, and of each image, one by one,
            where it had not encoded them before.
        origin: the capture whose programs fill it; None in a cache that was pickled, until it is used.
        plan: of those programs.
        pool: where its buffers lie if graphs are recorded on them, shared with other caches.
        running: a call has begun to write to the buffers.
        torn: one has failed there, and left recurrent states between two tokens.
        linked: keys and values [B, G, filled, d] of each layer with what autograd knows of them, where the
            calls that filled it recorded gradients; None where all of them are constants. Never
            written to: the buffers of the layers hold the same numbers, for calls without gradients.
    """

    layers: list[HidropLayer]  # type: ignore[assignment]

    def __init__(self, max_length: int | None = None) -> None:
        """Make an empty cache.

        Args:
            max_length: columns that prompt and answer may reach; buffers in a pool are sized for it.
        """
        super().__init__(layers=[])
        self.max_length = max_length
        self.log = TokenLog()
        self.speculative = False
        self.copies = 1
        self.origin: Any = None
        self.plan: Plan | None = None
        self.pool: KVPool | None = None
        self.linked: list[tuple[Tensor, Tensor]] | None = None
        self.running = False
        self.torn = False
        self._is_user_defined = False

    def __copy__(self) -> "HidropCache":
        """Return another name for the same layers, as of transformers' caches."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "HidropCache":
        """Copy the buffers; what autograd knows of them is shared, so that gradients of all copies meet there."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        kept = {name: value for name, value in self.__dict__.items() if name != "linked"}
        with self.turn():
            twin.__dict__ = {**copy.deepcopy(kept, memo), "linked": self.linked}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self.linked is not None:
            logger.info(
                "a pickled cache holds constants: gradients of calls behind it end at its tokens"
            )
        return {**self.__dict__, "linked": None}

    def __repr__(self) -> str:
        lengths = [layer.filled for layer in self.layers]
        return f"HidropCache(length={self.get_seq_length()}, layers={lengths}, bytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def recurrent(self) -> bool:
        """True if some layer keeps a state, out of which no token can be taken."""
        return any(isinstance(layer, RecurrentLayer) for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Rows; -1 while it is empty."""
        return self.layers[0].batch_size if self.layers else -1

    @property
    def is_compileable(self) -> bool:
        """False: what runs over this cache is compiled already."""
        return False

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return the logical length, or the number of tokens that one layer holds."""
        if layer_idx is None:
            return self.log.length
        return self.layers[layer_idx].filled

    def get_query_offset(self, layer_idx: int | None = None) -> int:
        """Return the logical length."""
        return self.get_seq_length()

    def allocate(
        self,
        layout: Layout,
        segments: list[str],
        shapes: Sequence[KVShape | StateShape],
        like: Tensor,
        room: int,
        devices: Sequence[torch.device] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Allocate buffers for a prompt, and return the parts of them that a prefill fills.

        Args:
            segments: the segment of each layer.
            shapes: KV heads and head widths of each layer, or the sizes of its state.
            like: gives dtype and device; states are fp32.
            room: tokens to come, of which a cache outside a pool gets the first.
            devices: of each layer, where they are not all that of `like`.
        """
        batch = len(layout.last)
        if devices is not None:
            self.pool = None
        if self.pool is None:  # addresses that stay need all of it now
            room = min(room, _ROOM)
        wanted: dict[str, Shape] = {}
        others: dict[str, Tensor] = {}
        for index, (segment, shape) in enumerate(zip(segments, shapes, strict=True)):
            if isinstance(shape, StateShape):
                if not others:
                    state = like.new_empty(0, dtype=torch.float32)
                wanted[f"keys_{index}"] = (batch, 1, shape.kernel, shape.channels)
                wanted[f"values_{index}"] = (batch, *shape[:3])
                others[f"values_{index}"] = state
                continue
            places = (batch, shape.heads, layout.lengths[segment] + room)
            wanted[f"keys_{index}"] = (*places, shape.key_width)
            wanted[f"values_{index}"] = (*places, shape.value_width)
        if self.pool is not None and not self.pool.admits(wanted, like, others):
            self.pool = None
        if self.pool is None:
            homes = [like.device] * len(segments) if devices is None else devices
            each = (device for device in homes for _ in range(2))
            buffers = {
                name: others.get(name, like).new_empty(size, device=device)
                for (name, size), device in zip(wanted.items(), each, strict=True)
            }
        else:
            buffers = self.pool.acquire(self, wanted, like, others)
        for index, (segment, shape) in enumerate(zip(segments, shapes, strict=True)):
            parts = buffers[f"keys_{index}"], buffers[f"values_{index}"], layout.lengths[segment]
            if isinstance(shape, StateShape):
                self.layers.append(RecurrentLayer(*parts, segment, shape))
            else:
                self.layers.append(HidropLayer(*parts, segment))
        return self.views() if self.pool is None else self.pool.prompt_parts(self.layers)

    def room(self, length: int, multiple: int) -> int:
        """Return the tokens that may come behind `length` columns, rounded up to a multiple."""
        return rounded_up(max(1, (self.max_length or 0) - length), multiple)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse the keys and values of a model that is not compiled.

        Raises:
            CacheError: always, also while the cache is empty and has no layer to refuse them.
        """
        raise CacheError(
            "a hidrop_fx cache cannot serve another model's layers; pass past_key_values=None to "
            "models that are not compiled by hidrop_fx"
        )

    def extend(self, valid: Tensor | None, tokens: int) -> Tensor:
        """Make room for new tokens in every row, and return their columns [B, tokens].

        Args:
            valid: bool [B, tokens], true for real tokens; None if all are.
        """
        for layer in self.layers:
            layer.reserve(tokens)
            layer.filled += tokens
        return self.log.extend(valid, tokens)

    def append(self, lengths: Mapping[str, int]) -> tuple[KVBuffers, KVBuffers]:
        """Make room for the tokens of a later turn, as many in each layer as its segment has.

        Returns:
            Keys and values [B, G, P, d] that each layer holds, and the parts [B, G, S, d] behind them to be filled.
        """
        ends = []
        for layer in self.layers:
            ends.append(layer.filled)
            layer.reserve(lengths[layer.segment])
            layer.filled += lengths[layer.segment]
        held, new = [], []
        for (keys, values), end in zip(self.views(), ends, strict=True):
            held.append((keys[:, :, :end].data, values[:, :, :end].data))
            new.append((keys[:, :, end:].data, values[:, :, end:].data))
        return held, new

    def link(self, linked: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take over keys and values [B, G, filled, d] of each layer with their gradients."""
        differentiable = any(keys.requires_grad or values.requires_grad for keys, values in linked)
        self.linked = list(linked) if differentiable else None

    def differentiable(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return copies of every layer's keys and values, the places of the last `tokens` zero.

        With their gradients where they have some.
        """
        held, room = self.views(), (0, 0, 0, tokens)
        found = []
        for index, layer in enumerate(self.layers):
            keys, values = held[index] if self.linked is None else self.linked[index]
            if isinstance(layer, RecurrentLayer):
                copied = self.linked is None
                found.append((keys.clone(), values.clone()) if copied else (keys, values))
                continue
            if self.linked is None:
                keys, values = keys[:, :, :-tokens], values[:, :, :-tokens]
            found.append((pad(keys.to(layer.dtype), room), pad(values.to(layer.dtype), room)))
        return found

    def write(self, linked: Sequence[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Write the last `tokens` of every layer's keys and values [B, G, filled, d] to the buffers, and link them."""
        for layer, buffers, parts in zip(self.layers, self.views(), linked, strict=True):
            new = slice(None) if isinstance(layer, RecurrentLayer) else slice(-tokens, None)
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[:, :, new].copy_(part[:, :, new].detach())
        self.link(linked)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the buffers for one call, and leave the cache as it was before where the call fails."""
        with self.turn():
            undo = self._checkpoint()
            try:
                yield
            except BaseException:
                undo()
                raise

    def _checkpoint(self) -> Callable[[], None]:
        self.running = False
        if self.get_seq_length() == 0:
            return self.reset
        forget = self.log.checkpoint()
        filled = [layer.filled for layer in self.layers]
        linked = self.linked

        def undo() -> None:
            forget()
            self.linked = linked
            self.torn |= self.running and self.recurrent
            for layer, end in zip(self.layers, filled, strict=True):
                layer.filled, layer.cleared = end, 0

        return undo

    def spans(self, multiple: int) -> dict[str, int]:
        """Return by segment the length of its prompt, and the tokens since rounded up to a multiple."""
        beyond = rounded_up(self.log.generated, multiple) - self.log.generated
        return {layer.segment: layer.filled + beyond for layer in self.layers}

    def views(self, spans: Mapping[str, int] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the filled part of every layer's keys and values, or the first `spans[segment]` places."""
        return views(self.layers, spans)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, at most those that came after the prompt.

        Args:
            tokens_to_remove: a negative number, as transformers passes it.
        """
        if tokens_to_remove > 0:
            raise InputError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number"
            )
        count = -tokens_to_remove
        if count > self.log.generated:
            raise CacheError(
                f"cannot crop {count} tokens: {self.log.generated} came after the prompt, and the "
                "prompt's vision tokens were chosen for the whole of it; prefill again instead"
            )
        if count == 0:
            return
        if self.recurrent:
            raise went_on(f"crop({tokens_to_remove})")
        super().crop(-count)
        self.log.crop(count)
        self._map_linked(lambda states: states[:, :, :-count])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        with self.turn():
            super().batch_select_indices(indices)
            self.log.map_rows(lambda rows: rows[indices.to(rows.device)])
            self._map_linked(lambda states: states[indices.to(states.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        with self.turn():
            super().batch_repeat_interleave(repeats)
            self.log.map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))
            self._map_linked(lambda states: states.repeat_interleave(repeats, dim=0))

    def _map_linked(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.linked is None:
            return
        if torch.is_inference_mode_enabled():  # where nothing is differentiable
            self.linked = None
            return
        with torch.enable_grad():
            self.linked = [(change(keys), change(values)) for keys, values in self.linked]

    def turn(self) -> AbstractContextManager[None]:
        """Keep other threads from the buffers while they are read or written."""
        return nullcontext() if self.pool is None else self.pool.turn()

    def reset(self) -> None:
        """Forget all tokens and buffers."""
        self.layers.clear()
        self.log.clear()
        self.linked = None
        self.torn = False
