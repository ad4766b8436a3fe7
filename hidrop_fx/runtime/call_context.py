"""The data that the inputs of one call are filled from: a prompt's, or a decode step's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.ops.masks import MaskRule, chunks_of, floors_of
from hidrop_fx.ops.tokens import take_rows
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.program.inputs import InputSpec, KVBuffers, KVPart, Past
from hidrop_fx.program.variant import Kind
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.kv.token_log import INVALID
from hidrop_fx.runtime.output import Rows
from hidrop_fx.runtime.packing import Packing
from hidrop_fx.runtime.prompt import Prompt, Rounding
from hidrop_fx.runtime.transfer import to_device
from hidrop_fx.training.ratios import Ratios


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptContext:
    """A prompt of B rows and L columns, laid out and embedded, before any program is chosen for it."""

    kind: Kind
    """"prefill" or "train"."""
    rows: Rows
    """Columns whose hidden states are wanted."""
    states: bool
    """The hidden states between the layers are wanted too."""
    prompt: Prompt
    layout: Layout
    rounding: Rounding
    rounded: bool
    """Lengths are such that a recorded graph may serve them."""
    rules: Mapping[str, MaskRule]
    """The rule of each captured mask."""
    device: torch.device
    kwargs: Mapping[str, Any]
    """Arguments of the model's forward, as they were given; packed samples with a row each."""
    packing: Packing | None
    """How the rows stood in those of the call, where it was packed."""
    text_columns: Tensor
    """int64 [B, T], on the device."""
    vision_columns: Tensor
    """int64 [B, V], on the device."""
    text_embeds: Tensor
    """Embeddings [B, T, D] of the text stream; image features where a placeholder belongs to it."""
    vision_embeds: Tensor | None
    """Features [B, V, D] of the vision stream; None where the tower runs beside the decoder."""
    features: Tensor | None
    """Image features [tokens, D]; None without images, or where the tower runs beside the decoder."""
    added: Mapping[int, Tensor] = field(default_factory=dict)
    """Features [tokens, D] that the decoder adds at the inputs of layers, by layer; none without images."""
    column_features: Tensor | None = None
    """Feature of each column, int64 [B, L + 1], where there are such additions."""
    feature_lengths: tuple[int, ...] = ()
    """Features of each kind."""
    kinds: tuple[str, ...] = ("image",)
    """Names of the kinds of vision inputs that the model takes."""
    pixel_values: Tensor | None = None
    """Images that the tower encodes beside the decoder."""
    feature_places: Tensor | None = None
    """Feature of each token of the vision stream, int64 [B, V], where the tower runs beside the decoder."""
    rope_parts: Tensor | None = None
    """The part of its axis that each dimension of cos and sin is in, int64 [d], where tokens bear several position ids."""
    ratios: Ratios | None = None
    buffers: KVBuffers = ()
    """KV buffers to be filled; none in training."""
    past: Past = field(default_factory=lambda: Past(buffers=(), shown={}))
    """What the cache held before, in a later turn; nothing in the first."""
    real: Tensor | None = None
    """bool [B, L], the real tokens of a later turn; None in the first."""

    @property
    def masks(self) -> tuple[tuple[str, MaskRule], ...]:
        """Captured masks that are not plain causal for this prompt, by name, and their rules."""
        columns, blocks = self.layout.columns, self.prompt.blocks is not None
        floors = self.prompt.narrows
        found = (
            (k, rule.for_call(columns, blocks=blocks, floors=floors))
            for k, rule in self.rules.items()
        )
        return tuple((name, rule) for name, rule in found if rule is not None)

    @property
    def differentiable(self) -> bool:
        """True if a backward may want something of a prompt's tokens, or of its learned ratios."""
        if not torch.is_grad_enabled():
            return False
        given = [self.text_embeds, self.vision_embeds, *self.added.values()]
        if self.ratios is not None:
            given.append(self.ratios.values)
        return any(value is not None and value.requires_grad for value in given)

    # What inputs are filled from (`PromptCall`).

    @property
    def output_columns(self) -> Tensor:
        """Columns of the rows that a program which chooses rows returns, int64 [B, R]."""
        return self.text_columns if self.rows == "text" else self.layout.output_columns

    @property
    def blocks(self) -> Tensor | None:
        """The block of each column and the sentinel, int64 [B, L + 1], -1 for none; None without blocks."""
        found = self.prompt.blocks
        return None if found is None else torch.nn.functional.pad(found, (0, 1), value=-1)

    @property
    def floors(self) -> Tensor:
        """The first column that each column's token may see, int64 [B, L + 1]; at the sentinel that of tokens behind the prompt."""
        length, bottleneck = self.layout.columns, self.prompt.bottleneck
        if bottleneck is None:
            return torch.zeros(len(self.layout.last), length + 1, dtype=torch.int64, device="cpu")
        return floors_of(bottleneck[:, 0], bottleneck[:, 1], length)

    def chunks(self, size: int) -> Tensor:
        """Return the chunk of each column, int64 [B, L + 1]; a row's first begins at its first real token."""
        columns = torch.cat([self.layout.text_columns, self.layout.vision_columns], dim=1)
        return chunks_of(columns.amin(dim=1), self.layout.columns, size)

    def vision_additions(self, layers: tuple[int, ...]) -> Tensor:
        """Return the sum of what some layers add to each token of the vision stream, [B, V, D]."""
        like, columns = self.text_embeds, self.vision_columns
        if self.column_features is None:
            return like.new_zeros(*columns.shape, like.shape[2])
        rows = self.added[layers[0]]
        for layer in layers[1:]:
            rows = rows + self.added[layer]
        return take_rows(rows, self.column_features.gather(1, columns))

    def additions(self, layer: int) -> Tensor:
        """Return what is added at a layer's input, by column: [B, L + 1, D], zero for words and the sentinel."""
        like, columns = self.text_embeds, self.layout.columns
        if self.column_features is None:
            return like.new_zeros(len(like), columns + 1, like.shape[2])
        places = nn.functional.pad(self.prompt.placeholder, (0, 1)).to(like.device)
        rows = take_rows(self.added[layer], self.column_features)
        return torch.where(places[:, :, None], rows, rows.new_zeros(()))

    def kept_tokens(self, event: str) -> Tensor:
        """Return the vision tokens that an event leaves of those that were in each row, int64 [B]."""
        counts = self.layout.stays.get(event, self.layout.vision_counts[event])
        return torch.tensor(counts, device="cpu")

    def ratio(self, layer: int) -> Tensor:
        """Return the learned share that a filter layer drops, fp32 []."""
        assert self.ratios is not None
        return self.ratios[layer]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeContext:
    """Tokens behind a prompt, q a row, which the cache has made room for."""

    cache: HidropCache
    rows: Rows
    """Tokens whose hidden states are wanted."""
    states: bool
    """The hidden states between the layers are wanted too."""
    embeds: Tensor
    """[B, q, D]"""
    valid: Tensor | None
    """bool [B, q]: real tokens; None if all are."""
    before: Tensor
    """Real tokens [B] between the prompt and these."""
    columns: Tensor
    """[B, q]"""
    windows: Mapping[str, int]
    """Sliding window, or size of the chunks, of each captured mask that has one."""
    spans: Mapping[str, int] | None
    """By segment: tokens that the program's KV buffers reach to; None where they end with these tokens."""
    kwargs: Mapping[str, Any]
    """Arguments of the model's forward, as they were given."""
    buffers: KVBuffers

    # What inputs are filled from (`DecodeCall`).

    def position_ids(self, segment: str) -> Tensor:
        """Return the position ids of the tokens in the layers of a segment, int64 [B, q]."""
        return self.cache.log.first_ids[segment][:, None] + self._behind

    def slots(self, segment: str) -> Tensor:
        """Return the places of the tokens in the buffers of a segment's layers, int64 [q]."""
        return self.cache.log.places(segment, self.embeds.shape[1])

    def mask(self, segment: str, window: int | None, chunked: bool = False) -> Tensor:
        """Return the cached tokens that the new ones see, bool [B, 1, q, S], as wide as the buffers.

        [B, G, q, S] where KV heads hold different tokens, and a window tells them apart.
        """
        if window is None:  # no token behind the prompt is too early for one of the prompt
            shown, tokens = self.cache.log.prompt_shown(segment), self.columns.shape[1]
            if tokens > 1:
                shown = shown.expand(-1, -1, tokens, -1)
            return torch.cat([shown, self._seen_since], dim=3)
        known = self.cache.log.columns_of(segment, self._since)
        if chunked:
            return visible(
                known, self.columns, None, self.cache.log.chunk_starts(self.columns, window)
            )
        return visible(known, self.columns, window)

    @property
    def real_order(self) -> Tensor:
        """Places of each row's real tokens, in order, then those of its padding, int64 [B, q]."""
        if self.valid is None:
            places = torch.arange(self.embeds.shape[1], device=self.columns.device)
            return places.repeat(len(self.columns), 1)
        return (~self.valid).int().argsort(dim=1, stable=True)

    @property
    def real_counts(self) -> Tensor:
        """Real tokens of each row, int64 [B]."""
        if self.valid is None:
            return torch.full_like(self.columns[:, 0], self.embeds.shape[1])
        return self.valid.sum(dim=1)

    @cached_property
    def _behind(self) -> Tensor:
        """Real tokens between the prompt and each new one, [B, q] or [B, 1]."""
        behind, tokens = self.before[:, None], self.embeds.shape[1]
        if self.valid is not None:
            return behind + (self.valid.cumsum(dim=1) - 1).clamp(min=0)
        return behind + torch.arange(tokens, device=behind.device) if tokens > 1 else behind

    @cached_property
    def _since(self) -> Tensor:
        """Columns [B, n] of the places behind the prompt, as many as the buffers' views have."""
        since = self.cache.log.new_columns
        if self.spans is None:
            return since
        name, span = next(iter(self.spans.items()))
        # The same in every segment.
        room = span - self.cache.log.prompt_columns[name].shape[-1] - since.shape[1]
        return torch.cat([since, since.new_full((len(since), room), INVALID)], dim=1)

    @cached_property
    def _seen_since(self) -> Tensor:
        return visible(self._since, self.columns, None)


def filled(
    specs: Sequence[InputSpec], context: PromptContext | DecodeContext, device: torch.device
) -> dict[str, Tensor]:
    """Fill declared inputs for a call, by name, on a device; static ones lie there already."""
    buffers, found, moving = context.buffers, {}, []
    for spec in specs:
        fill = spec.fill
        if isinstance(fill, KVPart):  # most of a program's inputs, and read without a call
            found[spec.name] = buffers[fill.entry][fill.part]
        else:
            value = found[spec.name] = fill(context)
            if value.device != device:
                moving.append(spec.name)
    if moving:
        moved = to_device([found[name] for name in moving], device)
        found.update(zip(moving, moved, strict=True))
    return found


def visible(
    known: Tensor, columns: Tensor, window: int | None, starts: Tensor | None = None
) -> Tensor:
    """Return which cached tokens [B, filled] or [B, G, filled] the new ones [B, q] see: bool [B, 1 or G, q, filled].

    Args:
        starts: [B, q], the first column that each sees; None for all.
    """
    # The sentinel's column is the largest number: later than every query, hence unseen.
    known = known[:, :, None] if known.dim() == 3 else known[:, None, None]
    columns = columns[:, None, :, None]
    mask = known <= columns
    if window is not None:
        mask &= known > columns - window
    if starts is not None:
        mask &= known >= starts[:, None, :, None]
    return mask
