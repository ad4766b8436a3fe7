"""One row of a batch in the plain loop: its tokens, its states, and a layer run on them alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hidrop_fx.capture.layers import rotation
from hidrop_fx.capture.temperature import scaled_by
from hidrop_fx.capture.twin import layer_index
from hidrop_fx.methods import PositionRule
from hidrop_fx.methods.cache_cuts import Cut
from hidrop_fx.ops.masks import CHUNKED, BlockRule
from hidrop_fx.planning.deepstack import Deepstack
from hidrop_fx.program.inputs import PromptCall
from hidrop_fx.reference.cut import RowCut
from hidrop_fx.reference.row_attention import RowAttention


class PreparedBatch(Protocol):
    """A padded batch as the programs of a schedule are given it."""

    @property
    def call(self) -> PromptCall:
        """The data that the inputs of its programs are filled from."""

    @property
    def deepstack(self) -> Deepstack | None:
        """Where the model adds features to vision tokens between its layers."""

    @property
    def rows(self) -> int:
        """B"""

    def as_given(self, full: Tensor) -> Tensor:
        """Move rows [B, L, D] of all columns to the columns as they were given."""

    def given_columns(self, columns: Tensor, row: int) -> Tensor:
        """Return columns [n] of a row as they were given."""

    @property
    def columns(self) -> int:
        """L, the length of the prompt with its padding."""

    def row_columns(self, name: str, row: int) -> Tensor:
        """Return the columns [n] of a row's "text" or "vision" tokens, without the sentinel."""

    def block_rule(self, layer: int) -> BlockRule | None:
        """Return how tokens of one block see each other in a layer; None where blocks mean nothing to it."""


@dataclass(kw_only=True)
class RowStates:
    """One row's run."""

    columns: list[Tensor] = field(default_factory=list)
    """For each layer the columns [n] of the tokens that it saw."""
    hidden: list[Tensor] = field(default_factory=list)
    """For each layer the hidden states [n, D] that it handed on."""
    output: Tensor | None = None
    """Normalised hidden states [n, D] of the last layer."""
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Filter layer -> columns [n] of the vision tokens before the prune, their scores fp32 [n]."""

    def detached(self) -> "RowStates":
        """Return the same states without what a backward needs."""
        return RowStates(
            columns=self.columns,
            hidden=[states.detach() for states in self.hidden],
            output=None if self.output is None else self.output.detach(),
            scores=self.scores,
        )

    def at(self, wanted: Tensor) -> "RowStates":
        """Select the tokens at the columns `wanted` [m]."""
        there = [torch.isin(columns, wanted) for columns in self.columns]
        return RowStates(
            columns=[c[t] for c, t in zip(self.columns, there, strict=True)],
            hidden=[h[t] for h, t in zip(self.hidden, there, strict=True)],
            output=None if self.output is None else self.output[there[-1]],
        )


@dataclass(kw_only=True)
class Row:
    """One row of a batch, with the tokens behind its prompt."""

    text: Tensor
    """Columns [t], those of new tokens included."""
    text_embeds: Tensor
    vision: Tensor
    """Columns [v]."""
    vision_embeds: Tensor
    is_vision: Tensor
    """bool, by column."""
    ids: Tensor
    """Position ids, by column, or by axis and column."""
    blocks: Tensor | None
    """The block of each column, whose tokens see each other both ways; -1 for none."""
    queries: Tensor
    """Columns of the queries of a score; -1 where there are fewer."""
    keep: dict[int, int]
    joining: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    """By filter layer: how many of the tokens that it drops are merged, and the columns [c] of the tokens they become."""
    additions: dict[int, Tensor] = field(default_factory=dict)
    """What is added at the inputs of layers, by layer: [L + 1, D], by column."""
    entering: Tensor | None = None
    """What is added to vision tokens as they enter, [v, D]."""
    id_copies: Tensor | None = None
    """All position ids [K, axes, L] of each column, where it bears several."""
    rope_parts: Tensor | None = None
    """The part of its axis that each dimension of cos and sin is in, where there are several."""
    new: int = 0
    """Tokens behind the prompt."""
    floors: Tensor | None = None
    """By column: the first column that its token sees; None for all before it."""
    left: dict[int, Tensor] = field(default_factory=dict)
    """By layer: columns [n] of the prompt that its cache still holds for those, where a later prune cuts it."""

    @cached_property
    def first(self) -> int:
        """The row's first column."""
        return int(torch.cat([self.text, self.vision]).min())

    def added(self, layer: int, columns: Tensor) -> Tensor | None:
        """Return what is added at a layer's input to the tokens at `columns` [n], [n, D]."""
        table = self.additions.get(layer)
        # Columns of new tokens may lie behind the prompt's.
        return None if table is None else table[columns.clamp(max=len(table) - 1)]


def row_of(batch: PreparedBatch, row: int, new: Tensor | None) -> Row:
    """Take a row out of a batch, with tokens `new` [n, D] behind its prompt."""
    call, layout = batch.call, batch.call.layout
    assert call.vision_embeds is not None
    text, vision = (batch.row_columns(name, row) for name in ("text", "vision"))
    text_embeds = call.text_embeds[row, : len(text)]
    is_vision = layout.is_vision[row].to(text.device)
    ids = layout.position_ids[..., row, :].to(text.device)
    copies = layout.position_copies
    copies = None if copies is None else copies[..., row, :].to(text.device)
    blocks = call.blocks
    blocks = None if blocks is None else blocks[row].to(text.device)
    if new is not None:
        start = int(torch.cat([text, vision]).max()) + 1
        steps = torch.arange(len(new), device=text.device)
        text = torch.cat([text, start + steps])
        text_embeds = torch.cat([text_embeds, new])
        is_vision = torch.cat([is_vision[:start], is_vision.new_zeros(len(new))])
        behind = ids[..., start - 1].amax() + 1 + steps
        ids = torch.cat([ids[..., :start], behind.expand(*ids.shape[:-1], -1)], dim=-1)
        if copies is not None:
            following = behind.expand(*copies.shape[:-1], -1)
            copies = torch.cat([copies[..., :start], following], dim=-1)
        if blocks is not None:
            blocks = torch.cat([blocks[:start], blocks.new_full((len(new),), -1)])
    floors = None
    if layout.plan.schedule.bottleneck is not None:
        floors = call.floors[row].to(text.device)
        if new is not None:
            floors = torch.cat([floors[:start], floors[-1:].expand(len(new))])
    deepstack = batch.deepstack
    missed = () if deepstack is None else deepstack.on_entering(layout.plan.schedule)
    added = {} if deepstack is None else {k: call.additions(k)[row] for k in deepstack.layers}
    return Row(
        text=text,
        text_embeds=text_embeds,
        vision=vision,
        vision_embeds=call.vision_embeds[row, : len(vision)],
        is_vision=is_vision,
        ids=ids,
        blocks=blocks,
        queries=layout.query_columns[row].to(text.device),
        keep={e.layer: layout.stays[e.name][row] for e in layout.plan.of_kind("prune")},
        joining={
            e.layer: (layout.merged[e.name][row], _real(layout.added_columns[e.name][row], batch))
            for e in layout.plan.of_kind("prune")
            if e.name in layout.merged
        },
        additions=added,
        entering=call.vision_additions(missed)[row, : len(vision)] if missed else None,
        id_copies=copies,
        rope_parts=call.rope_parts,
        new=0 if new is None else len(new),
        floors=floors,
    )


def _real(columns: Tensor, batch: PreparedBatch) -> Tensor:
    """Return the columns [n] that are none of padding, on the device of the batch."""
    return columns[columns < batch.columns].to(batch.call.text_embeds.device)


@dataclass(kw_only=True)
class RunningRow:
    """A row on its way through the layers, as events find it and leave it."""

    decoder: Any
    row: Row
    rule: PositionRule
    cut: Cut | None
    """What caches keep of the prompt."""
    block_rules: Sequence[BlockRule | None]
    """By layer."""
    attention: RowAttention
    columns: Tensor
    """Columns [n] of the tokens that are there."""
    hidden: Tensor
    """Their hidden states [n, D]."""
    before: Tensor
    """The input [n, D] of the layer before."""
    states: RowStates
    modules: Mapping[str, Any]
    """What the model was compiled with beside its own modules, by name."""
    by_images: bool = False
    """Each query stands for the last vision token at or before it that is there."""
    tempered: Sequence[Any] = ()
    """Attentions that scale their queries by position."""
    copies: bool = True
    """Tokens bear all their position ids, and not the first alone."""
    renumbered: bool = False
    """The tokens that are there were numbered anew."""

    @property
    def is_vision(self) -> Tensor:
        """True for the vision tokens among those that are there, bool [n]."""
        return self.row.is_vision[self.columns]

    @property
    def in_prompt(self) -> Tensor:
        """True for those that are none of the tokens behind the prompt, bool [n]."""
        places = torch.arange(len(self.columns), device=self.columns.device)
        return places < len(self.columns) - self.row.new

    def rotation(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin [1, n, d] that the layer of an index is given; None for one that convolves."""
        copies, parts = self.row.id_copies, self.row.rope_parts
        if copies is None or parts is None or not self.copies:
            ids = self._position_ids().unsqueeze(-2)
            return rotation(self.decoder, self.hidden[None], ids, index)
        tables = []
        for k, own in enumerate(copies):
            ids = own[:, self.columns].unsqueeze(-2)
            of_one = rotation(self.decoder, self.hidden[None], ids, index)
            if of_one is None:
                return None
            part = parts.to(self.hidden.device) == k
            tables.append([table.masked_fill(~part, 0) for table in of_one])
        cos, sin = (torch.stack(each).sum(dim=0) for each in zip(*tables, strict=True))
        return cos, sin

    def join(self, columns: Tensor, hidden: Tensor) -> None:
        """Add tokens at the columns [n], with hidden states [n, D]."""
        self.columns, order = torch.cat([self.columns, columns]).sort()
        self.hidden = torch.cat([self.hidden, hidden])[order]

    def keep(self, stays: Tensor) -> None:
        """Drop the tokens where `stays` [n] is false."""
        self.columns, self.hidden = self.columns[stays], self.hidden[stays]
        self.renumbered = self.rule.renumbers_after_prunes

    def run(self, layer: nn.Module, index: int) -> Tensor:
        """Run the layer of an index on the tokens that are there; return its hidden states [n, D]."""
        rule, blocks = self.block_rules[index], self.row.blocks
        self.attention.forget()
        self.attention.columns = self.columns
        self.attention.blocks = None if rule is None or blocks is None else blocks[self.columns]
        self.attention.beyond = rule == "beyond"
        types = getattr(self.decoder.config, "layer_types", None)
        self.attention.chunked = types is not None and types[index] == CHUNKED
        self.attention.first = self.row.first
        floors = self.row.floors
        self.attention.floors = None if floors is None else floors[self.columns]
        self.attention.left = self.row.left.get(index)
        self.attention.cut = None
        if self.cut is not None and self.row.new:
            self.attention.cut = RowCut(
                cut=self.cut, layer=index, layers=len(self.block_rules), new=self.row.new
            )
        ids = self._position_ids().unsqueeze(-2)
        with scaled_by(self.tempered, ids):
            out = layer(
                self.hidden[None],
                attention_mask=None,
                position_ids=ids,
                position_embeddings=self.rotation(index),
                use_cache=False,
            )
        states: Tensor = out[0] if isinstance(out, tuple) else out
        return states[0]

    def run_branch(self, layers: nn.ModuleList, index: int) -> None:
        """Run a side branch at the input of the layer of an index; the tokens that are there stay as they are."""
        there = self.hidden
        last = len(self.block_rules) - 1
        for offset, layer in enumerate(layers):
            place = layer_index(layer)
            self.hidden = self.run(layer, min(index + offset if place is None else place, last))
        self.hidden = there

    def run_reading(self, layer: nn.Module, index: int) -> Tensor:
        """Run a layer on the tokens that are there and the vision tokens as they entered; the latter stay so."""
        there, hidden = self.columns, self.hidden
        self.columns, order = torch.cat([there, self.row.vision]).sort()
        self.hidden = torch.cat([hidden, self.row.vision_embeds])[order]
        states = self.run(layer, index)[~self.is_vision]
        self.columns, self.hidden = there, hidden
        return states

    @property
    def system(self) -> Tensor:
        """Columns [n] of the text before the first vision token; none without one."""
        vision = self.row.vision
        return self.row.text[self.row.text < vision.min()] if len(vision) else vision

    def _position_ids(self) -> Tensor:
        row, columns = self.row, self.columns
        if self.renumbered:
            return torch.arange(len(columns), device=columns.device).expand(*row.ids.shape[:-1], -1)
        ids = row.ids
        if self.rule.renumbers_text:
            ids = torch.where(row.is_vision, ids, ids - row.is_vision.cumsum(0))
        return ids[..., columns]
