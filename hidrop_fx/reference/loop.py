"""Run a schedule the plain way: a loop over the model's own layers, row by row.

    for k, layer in enumerate(decoder.layers):
        if k == inject: hidden = merge(text, vision)
        if k in prune:  hidden = hidden[best(score(layer, hidden), keep)]
        if k == exit:   hidden = hidden[is_text]
        hidden = layer(hidden)

No captured graph, no pass and no padding takes part, so this is what programs are held against. Score functions are those
of `hidrop_fx.methods`, which the prune pass calls too.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hidrop_fx.capture.export import attention_implemented_by
from hidrop_fx.capture.layers import layer_list
from hidrop_fx.methods import POSITION_RULES, PositionRule, Scorer
from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention import repeat_heads
from hidrop_fx.program.inputs import PromptCall
from hidrop_fx.schedule.schedule import Schedule


class PreparedBatch(Protocol):
    """A padded batch as the programs of a schedule are given it."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def call(self) -> PromptCall:
        """What the inputs of its programs are filled from."""

    @property
    def rows(self) -> int:
        """B"""

    @property
    def columns(self) -> int:
        """L, the length of the prompt with its padding."""

    def row_columns(self, name: str, row: int) -> Tensor:
        """Return the columns [n] of a row's "text" or "vision" tokens, without the sentinel."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """The events of a run: those of a schedule, or as many of them as some pass has carried out."""

    inject: int | None
    """None: vision tokens never enter."""
    prune: tuple[int, ...] = ()
    exit: int | None = None
    positions: PositionRule = POSITION_RULES[POSITION_RULES.default]

    @classmethod
    def of(cls, schedule: Schedule) -> "Events":
        """Return all events of a schedule."""
        return cls(
            inject=schedule.inject,
            prune=tuple(schedule.prune),
            exit=schedule.exit,
            positions=schedule.position_rule,
        )


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


def run_loop(
    model: Any,
    batch: PreparedBatch,
    events: Events,
    *,
    new: Tensor | None = None,
    grad: bool = False,
) -> list[RowStates]:
    """Run every row of a batch through the model's own decoder layers.

    Args:
        new: embeddings [B, n, D] of tokens behind the prompt, which see it as a cache would hold it:
            no query of a score is behind them. Their columns follow each row's last.
        grad: record what a backward needs.
    """
    decoder, attention, scorer = model.get_decoder(), _Attention(), batch.schedule.scorer
    with (
        attention_implemented_by(decoder.config, attention),
        torch.set_grad_enabled(grad),
    ):
        rows = [_row(batch, row, None if new is None else new[row]) for row in range(batch.rows)]
        return [_run_row(decoder, row, scorer, events, attention) for row in rows]


@dataclass(kw_only=True)
class _Row:
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
    """Position ids, by column."""
    queries: Tensor
    """Columns of the queries of a score; -1 where there are fewer."""
    keep: dict[int, int]


def _row(batch: PreparedBatch, row: int, new: Tensor | None) -> _Row:
    call, layout = batch.call, batch.call.layout
    assert call.vision_embeds is not None
    text, vision = (batch.row_columns(name, row) for name in ("text", "vision"))
    text_embeds = call.text_embeds[row, : len(text)]
    is_vision = layout.is_vision[row].to(text.device)
    ids = layout.position_ids[row].to(text.device)
    if new is not None:
        start = int(torch.cat([text, vision]).max()) + 1
        steps = torch.arange(len(new), device=text.device)
        text = torch.cat([text, start + steps])
        text_embeds = torch.cat([text_embeds, new])
        is_vision = torch.cat([is_vision[:start], is_vision.new_zeros(len(new))])
        ids = torch.cat([ids[:start], ids[start - 1] + 1 + steps])
    return _Row(
        text=text,
        text_embeds=text_embeds,
        vision=vision,
        vision_embeds=call.vision_embeds[row, : len(vision)],
        is_vision=is_vision,
        ids=ids,
        queries=layout.query_columns[row].to(text.device),
        keep={e.layer: layout.vision_counts[e.name][row] for e in layout.plan.of_kind("prune")},
    )


class _Attention:
    """Attention of one unpadded row, which keeps the queries, keys and values it was given."""

    columns: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        self.scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        self.query, self.key, self.value = query, key, value
        distance = self.columns[:, None] - self.columns[None, :]
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scale)
        return out.transpose(1, 2).contiguous(), None


def _run_row(
    decoder: Any, row: _Row, scorer: Scorer, events: Events, attention: _Attention
) -> RowStates:
    states = RowStates()
    columns, hidden, is_vision = row.text, row.text_embeds, row.is_vision
    before = hidden  # the input of the layer before
    renumbered = False
    for layer, module in enumerate(layer_list(decoder)[1]):
        if layer == events.inject:
            columns, order = torch.cat([columns, row.vision]).sort()
            hidden = torch.cat([hidden, row.vision_embeds])[order]
        if layer in events.prune:
            ids = _position_ids(row, columns, events.positions, renumbered)
            with torch.no_grad():
                _run_layer(decoder, module, hidden, columns, ids, attention)
                scores = _scores(scorer, attention, row, columns, hidden, before)
            candidates = is_vision[columns].nonzero().flatten()
            states.scores[layer] = columns[candidates], scores[candidates]
            keep = min(row.keep[layer], len(candidates))
            order = scores[candidates].argsort(descending=True, stable=True)
            stays = ~is_vision[columns]
            stays[candidates[order[:keep]]] = True
            columns, hidden = columns[stays], hidden[stays]
            renumbered = events.positions.renumbers_after_prunes
        if layer == events.exit:
            stays = ~is_vision[columns]
            columns, hidden = columns[stays], hidden[stays]
            renumbered = events.positions.renumbers_after_prunes
        ids = _position_ids(row, columns, events.positions, renumbered)
        before = hidden
        hidden = _run_layer(decoder, module, hidden, columns, ids, attention)
        states.columns.append(columns)
        states.hidden.append(hidden)
    states.output = decoder.norm(hidden)
    return states


def _scores(
    scorer: Scorer,
    attention: _Attention,
    row: _Row,
    columns: Tensor,
    hidden: Tensor,
    before: Tensor,
) -> Tensor:
    """Scores [n] of a row's tokens, once the filter layer ran on all of them."""
    wanted = row.queries[row.queries >= 0]
    places = torch.searchsorted(columns, wanted)
    given = {
        "columns": columns[None],
        "is_vision": row.is_vision[columns][None],
        "query_columns": wanted[None],
        "scale": attention.scale,
        "query": tokens.take_keys(attention.query, places[None]),
        "key": attention.key,
        "value": attention.value,
        "hidden": hidden[None],
        "previous_hidden": before[None],
    }
    return scorer.function(*(given[name] for name in scorer.parameters))[0]


def _position_ids(row: _Row, columns: Tensor, rule: PositionRule, renumbered: bool) -> Tensor:
    if renumbered:
        return torch.arange(len(columns), device=columns.device)
    ids = row.ids
    if rule.renumbers_text:
        ids = torch.where(row.is_vision, ids, ids - row.is_vision.cumsum(0))
    return ids[columns]


def _run_layer(
    decoder: Any,
    layer: nn.Module,
    hidden: Tensor,
    columns: Tensor,
    position_ids: Tensor,
    attention: _Attention,
) -> Tensor:
    attention.columns = columns
    ids = position_ids[None]
    out = layer(
        hidden[None],
        attention_mask=None,
        position_ids=ids,
        position_embeddings=decoder.rotary_emb(hidden[None], ids),
        use_cache=False,
    )
    states: Tensor = out[0] if isinstance(out, tuple) else out
    return states[0]
