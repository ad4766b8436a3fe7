"""Key/value buffers of one decoder layer, with room behind the tokens that they hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hidrop_fx.capture.regions import KVShape, StateShape
from hidrop_fx.errors import CacheError

# Tokens that a full buffer grows by at least, and what share of those it holds.
_GROWTH = 64
_GROWTH_SHARE = 4


class HidropLayer(CacheLayerMixin):
    """Keys and values [B, G, capacity, d] of one layer; the first `filled` places are in use.

    Attributes:
        cleared: where the zeros end that are known to lie behind those, if any are.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, keys: Tensor, values: Tensor, filled: int, segment: str) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.filled = filled
        self.cleared = 0
        self.segment = segment
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    @property
    def shape(self) -> KVShape | StateShape:
        """Heads and widths, as a capture names them."""
        return KVShape(self.keys.shape[1], self.keys.shape[3], self.values.shape[3])

    def places(self, tokens: int) -> tuple[int, int]:
        """Return where so many tokens end in the keys and in the values."""
        return tokens, tokens

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
        self.filled = self.cleared = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.filled -= abs(tokens_to_remove)
        self.cleared = 0  # the tokens that go lie there

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more."""
        # One place stays free: the filled part of a full buffer is contiguous, of any other not,
        # and compiled code tells them apart.
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.keys, self.values = self.keys.clone(), self.values.clone()
        missing = self.filled + tokens + 1 - self.keys.shape[2]
        if missing > 0:
            room = max(missing, _GROWTH, self.filled // _GROWTH_SHARE)
            # Keys last, since they tell the room: memory may end, or a user interrupt, in between.
            self.values = _grown(self.values, room)
            self.keys = _grown(self.keys, room)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = indices.to(self.keys.device)
        self.keys = _selected(self.keys, self.filled, indices)
        self.values = _selected(self.values, self.filled, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch_size, device=self.keys.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))


class RecurrentLayer(HidropLayer):
    """What a recurrent layer keeps behind its tokens: a state, and no list that a token could be taken out of.

    Attributes:
        keys: what its short convolution read of the last K tokens, [B, 1, K, C].
        values: its state, fp32 [B, H, d, e].
        filled: tokens that it has seen.
    """

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, filled: int, segment: str, shape: Any) -> None:
        super().__init__(keys, values, filled, segment)
        self._shape: StateShape = shape

    @property
    def shape(self) -> StateShape:
        """Sizes of the state, as a capture names them."""
        return self._shape

    def places(self, tokens: int) -> tuple[int, int]:
        """Return where the inputs and the state end, however many tokens were seen."""
        return self._shape.kernel, self._shape.rows

    def crop(self, tokens_to_remove: int) -> None:
        raise went_on(f"crop({tokens_to_remove})")

    def reserve(self, tokens: int) -> None:
        """Make the state one that may be written to, whatever the grad mode."""
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys = _selected(self.keys, self._shape.kernel, indices)
        self.values = _selected(self.values, self._shape.rows, indices)


def went_on(what: str) -> CacheError:
    """Return the error for what would take a token out of a recurrent state."""
    return CacheError(
        f"{what}: the recurrent layers of this model have seen the tokens that are to go, and a state keeps no single token "
        "that could be taken out; pass the whole text with past_key_values=None"
    )


def views(
    layers: Sequence[HidropLayer], spans: Mapping[str, int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return the filled part of every layer's keys and values, or the first `spans[segment]` places.

    Over the buffers' memory, but no views in autograd's sense: a compiler would trace the whole
    buffer, and how the part comes from it, for each of them.
    """
    found, sizes = [], _Sizes()
    for layer in layers:
        end, last = layer.places(layer.filled if spans is None else spans[layer.segment])
        keys, values = layer.keys, layer.values
        # Half the time of slices, and there are two a layer for each token.
        keys = keys.as_strided(sizes[keys.shape, end], keys.stride()).data
        values = values.as_strided(sizes[values.shape, last], values.stride()).data
        found.append((keys, values))
    return found


class _Sizes(dict[tuple[torch.Size, int], tuple[int, int, int, int]]):
    """Sizes of the first `end` places of buffers, by their shape and `end`."""

    def __missing__(self, key: tuple[torch.Size, int]) -> tuple[int, int, int, int]:
        (batch, heads, capacity, width), end = key
        size = self[key] = batch, heads, min(end, capacity), width
        return size


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
