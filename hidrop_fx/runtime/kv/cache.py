"""Per-layer key/value buffers, behind the `Cache` that transformers expects.

Every decoder layer of a rewritten model has seen another number of tokens. Its buffer holds exactly
those, and room for the tokens to come. Layers of one segment are filled alike, so what is known about
a cached token (its column, hence whether it is valid and how far away) is kept once a segment for the
prompt, and once for all segments for the tokens since, which all layers see.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.ops.columns import rounded_up
from hidrop_fx.planning.layout import Layout
from hidrop_fx.runtime.kv.pool import KVPool

# Column of a cached token that no query may see.
INVALID = torch.iinfo(torch.int64).max
# Tokens that a full buffer grows by at least, and what share of those it holds.
_GROWTH = 64
_GROWTH_SHARE = 4
# Tokens that a new buffer has room for behind its prompt, however many may come.
_ROOM = 256


class HidropLayer(CacheLayerMixin):
    """Keys and values [B, G, capacity, d] of one layer; the first `filled` places are in use."""

    is_sliding = False
    is_croppable = True

    def __init__(self, keys: Tensor, values: Tensor, filled: int, segment: str) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.filled = filled
        self.segment = segment
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise CacheError("a hidrop_fx cache is filled by its own programs")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise CacheError(
            "a hidrop_fx cache cannot serve another model's layers; pass past_key_values=None to "
            "models that are not compiled by hidrop_fx"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.filled = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.filled -= abs(tokens_to_remove)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more."""
        # One place stays free: the filled part of a full buffer is contiguous, of any other not,
        # and compiled code tells them apart.
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.keys, self.values = self.keys.clone(), self.values.clone()
        missing = self.filled + tokens + 1 - self.keys.shape[2]
        if missing > 0:
            room = max(missing, _GROWTH, self.filled // _GROWTH_SHARE)
            self.keys = _grown(self.keys, room)
            self.values = _grown(self.values, room)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys = _selected(self.keys, self.filled, indices)
        self.values = _selected(self.values, self.filled, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch_size, device=self.keys.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))


class HidropCache(Cache):
    """The KV cache of a compiled model; `generate` and `forward` make it.

    `get_seq_length()` is the logical length: prompt columns, padding and images included, plus the
    tokens generated since. `get_seq_length(k)` is what layer k really holds.
    """

    layers: list[HidropLayer]  # type: ignore[assignment]

    def __init__(self, max_length: int | None = None) -> None:
        """Args: max_length: columns that prompt and answer may reach; buffers on an pool are sized for it."""
        super().__init__(layers=[])
        self.max_length = max_length
        self.prompt_length = 0
        self.generated = 0
        self.prompt_columns: dict[str, Tensor] = {}
        """By segment: the column [B, S] of each token of the prompt."""
        self.new_columns: Tensor = torch.empty(0, 0)
        """The column [B, generated] of each token since, in every segment."""
        self.first_column: Tensor = torch.empty(0)
        """Of the first token behind the prompt, [B]."""
        self.first_ids: dict[str, Tensor] = {}
        """By segment: position id [B] of that token."""
        self.advanced: Tensor = torch.empty(0)
        """Real tokens [B] since the prompt."""
        self._shown: dict[str, Tensor] = {}
        self.ragged = False
        self.prompt_mask: Tensor | None = None
        """bool [B, L]: which columns of the prompt are real."""
        self.padded_right = True
        """Whether some row of the prompt may not end with a real token."""
        self.speculative = False
        """Whether a draft comes along with the prompt, as in assisted decoding."""
        self.origin: Any = None
        """The capture whose programs fill this cache."""
        self.pool: KVPool | None = None
        """Where graphs are recorded: who else may use this memory, and when."""
        self._is_user_defined = False

    def __repr__(self) -> str:
        lengths = [layer.filled for layer in self.layers]
        return f"HidropCache(length={self.get_seq_length()}, layers={lengths}, bytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def batch_size(self) -> int:
        return self.layers[0].batch_size if self.layers else -1

    @property
    def is_compileable(self) -> bool:
        """False: what runs over this cache is compiled already."""
        return False

    @property
    def columns(self) -> dict[str, Tensor]:
        """By segment: the column [B, filled] of each cached token; `INVALID` where none may see it."""
        return {
            name: torch.cat([prompt, self.new_columns], dim=1)
            for name, prompt in self.prompt_columns.items()
        }

    @property
    def next_column(self) -> Tensor:
        """Of the next token, [B]."""
        return self.first_column + self.advanced

    @property
    def next_ids(self) -> dict[str, Tensor]:
        """By segment: position id [B] of the next token."""
        return {name: ids + self.advanced for name, ids in self.first_ids.items()}

    def prompt_shown(self, segment: str) -> Tensor:
        """Which tokens of the prompt may be seen by those behind it: bool [B, 1, 1, S]."""
        if segment not in self._shown:
            self._shown[segment] = (self.prompt_columns[segment] != INVALID)[:, None, None]
        return self._shown[segment]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        if layer_idx is None:
            return self.prompt_length + self.generated
        return self.layers[layer_idx].filled

    def get_query_offset(self, layer_idx: int | None = None) -> int:
        return self.get_seq_length()

    def allocate(
        self,
        layout: Layout,
        segments: list[str],
        shapes: list[tuple[int, int]],
        like: Tensor,
        length: int,
        draft: int = 0,
        multiple: int = 1,
    ) -> list[tuple[Tensor, Tensor]]:
        """Make buffers for a prompt, and return the parts of them that a prefill fills.

        Args:
            segments: the segment of each layer. shapes: KV heads and head width of each layer.
            like: gives dtype and device. length: columns of prompt and draft, as they were given.
            draft: tokens behind the prompt that can be cropped again.
            multiple: the room for new tokens is one.
        """
        batch = len(layout.last)
        room = rounded_up(max(1, (self.max_length or 0) - length), multiple)
        if self.pool is None:  # addresses that stay need all of it now
            room = min(room, _ROOM)
        wanted = [
            (batch, heads, layout.lengths[segment] + room, width)
            for segment, (heads, width) in zip(segments, shapes, strict=True)
        ]
        if self.pool is not None and not self.pool.admits(wanted, like):
            self.pool = None
        for index, (segment, shape) in enumerate(zip(segments, wanted, strict=True)):
            filled = layout.lengths[segment]
            keys = self._buffer(f"keys_{index}", shape, like)
            values = self._buffer(f"values_{index}", shape, like)
            self.layers.append(HidropLayer(keys, values, filled, segment))
        self.prompt_length, self.generated = length - draft, draft
        self.ragged = layout.ragged
        self.first_column = torch.tensor(layout.last, device=like.device) + 1 - draft
        tensors = {id(ids): ids for ids in layout.next_ids.values()}
        made = {k: torch.tensor(ids, device=like.device) - draft for k, ids in tensors.items()}
        self.first_ids = {name: made[id(ids)] for name, ids in layout.next_ids.items()}
        self.advanced = torch.full_like(self.first_column, draft)
        return self.views()

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if self.pool is not None:
            return self.pool.take(self, name, shape, like)
        return like.new_empty(shape)

    def goes_on_with(self, attention_mask: Tensor) -> bool:
        """Whether a mask [B, past + new], bool, shows what was there before, and all that is new."""
        if self.prompt_mask is None:
            return False
        known = torch.cat([self.prompt_mask, self.new_columns != INVALID], dim=1)
        new = attention_mask.shape[1] - known.shape[1]
        return torch.equal(attention_mask, torch.nn.functional.pad(known, (0, new), value=True))

    def hide(self, attention_mask: Tensor) -> None:
        """Take a mask [B, prompt + generated] that hides tokens generated before, e.g. after an EOS.

        Raises:
            InputError: it shows another prompt than the one that was scored.
        """
        prompt, count = self.prompt_length, self.generated
        if self.prompt_mask is not None and not torch.equal(
            attention_mask[:, :prompt], self.prompt_mask
        ):
            raise InputError(
                "attention_mask hides or shows other prompt columns than when the cache was filled; "
                "vision tokens were chosen for that prompt: pass the whole text without a cache"
            )
        if count == 0:
            return
        known = self.new_columns
        gone = (known != INVALID) & ~attention_mask[:, prompt:]
        if not bool(gone.any()):
            return
        hidden = gone | (known == INVALID)
        self.new_columns = torch.where(hidden, INVALID, known - gone.cumsum(dim=1))
        self.advanced = self.advanced - gone.sum(dim=1)
        self.ragged = True

    def note_columns(self, columns: Mapping[str, Tensor], sentinel: int) -> None:
        """Take the columns [B, S] that each segment of the prefill ended up with."""
        for name, values in columns.items():
            known = torch.where(values == sentinel, INVALID, values) if self.ragged else values
            end = known.shape[1] - self.generated  # a draft is no part of the prompt
            self.prompt_columns[name], self.new_columns = known[:, :end], known[:, end:]

    def extend(self, valid: Tensor | None, tokens: int) -> Tensor:
        """Make room for new tokens a row, and give their columns [B, tokens]."""
        for layer in self.layers:
            layer.reserve(tokens)
            layer.filled += tokens
        columns = self.next_column[:, None]
        if tokens > 1:
            columns = columns + torch.arange(tokens, device=columns.device)
        if valid is not None:
            columns = self.next_column[:, None] + valid.cumsum(dim=1) - 1
            columns = torch.where(valid, columns, INVALID)
            self.ragged |= not bool(valid.all())
            self.padded_right |= not bool(valid[:, -1].all())
        self.new_columns = torch.cat([self.new_columns, columns], dim=1)
        self.advanced = self.advanced + (tokens if valid is None else valid.sum(dim=1))
        self.generated += tokens
        return columns

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the buffers for one call, and leave the cache as it was before where the call fails."""
        with self.turn():
            undo = self._undo()
            try:
                yield
            except BaseException:
                undo()
                raise

    def _undo(self) -> Callable[[], None]:
        """Return a function that forgets what a call appends, hides or moves on."""
        if self.get_seq_length() == 0:
            return self.reset
        before = (self.new_columns, self.advanced, self.generated, self.ragged, self.padded_right)
        filled = [layer.filled for layer in self.layers]

        def undo() -> None:
            (
                self.new_columns,
                self.advanced,
                self.generated,
                self.ragged,
                self.padded_right,
            ) = before
            for layer, end in zip(self.layers, filled, strict=True):
                layer.filled = end

        return undo

    def spans(self, multiple: int) -> dict[str, int]:
        """By segment: its prompt, and the tokens since rounded up to a multiple."""
        beyond = rounded_up(self.generated, multiple) - self.generated
        return {layer.segment: layer.filled + beyond for layer in self.layers}

    def views(self, spans: Mapping[str, int] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the filled part of every layer's keys and values, or as many places as `spans` says.

        Over the buffers' memory, but no views in autograd's sense: a compiler would trace the whole
        buffer, and how the part comes from it, for each of them.
        """
        views = []
        for layer in self.layers:
            end = layer.filled if spans is None else spans[layer.segment]
            views.append((layer.keys[:, :, :end].data, layer.values[:, :, :end].data))
        return views

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, at most those that came after the prompt."""
        if tokens_to_remove > 0:
            raise InputError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number"
            )
        count = -tokens_to_remove
        if count > self.generated:
            raise CacheError(
                f"cannot crop {count} tokens: {self.generated} came after the prompt, and the "
                "prompt's vision tokens were chosen for the whole of it; prefill again instead"
            )
        if count == 0:
            return
        super().crop(-count)
        real = self.new_columns[:, -count:] != INVALID
        self.new_columns = self.new_columns[:, :-count]
        self.advanced = self.advanced - real.sum(dim=1)
        self.generated -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        with self.turn():
            super().batch_select_indices(indices)
            self._map_rows(lambda rows: rows[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self.turn():
            super().batch_repeat_interleave(repeats)
            self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def turn(self) -> AbstractContextManager[None]:
        """While the buffers are read or written: no other thread has its turn."""
        return nullcontext() if self.pool is None else self.pool.turn()

    def reset(self) -> None:
        self.layers.clear()
        self.prompt_columns, self.first_ids, self._shown = {}, {}, {}
        self.prompt_length = self.generated = 0

    def _map_rows(self, change: Any) -> None:
        for rows in (self.prompt_columns, self.first_ids, self._shown):
            rows |= {name: change(values) for name, values in rows.items()}
        self.new_columns = change(self.new_columns)
        self.first_column, self.advanced = change(self.first_column), change(self.advanced)
        if self.prompt_mask is not None:
            self.prompt_mask = change(self.prompt_mask)


def _selected(buffer: Tensor, filled: int, indices: Tensor) -> Tensor:
    """Other rows: in place where their number stays, as in beam search."""
    rows = buffer[:, :, :filled][indices]
    if len(rows) == len(buffer) and not buffer.is_inference():
        buffer[:, :, :filled] = rows
        return buffer
    room = buffer.shape[2] - filled
    return _grown(rows, min(room, _GROWTH))


def _grown(buffer: Tensor, room: int) -> Tensor:
    batch, heads, _, width = buffer.shape
    return torch.cat([buffer, buffer.new_zeros(batch, heads, room, width)], dim=2)
