"""What a schedule means, run the plain way: a loop over the model's own layers, row by row.

    for k, layer in enumerate(decoder.layers):
        if k == inject: hidden = merge(text, vision)
        if k in prune:  hidden = hidden[best(scores(layer, hidden), keep)]
        if k == exit:   hidden = hidden[is_text]
        hidden = layer(hidden)

No captured graph, no pass and no padding takes part, so this is what programs are held against.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hidrop_fx.capture import export as capture
from hidrop_fx.inspection.batch import Batch
from hidrop_fx.ops.attention import repeat_heads
from hidrop_fx.schedule.schedule import Schedule

_IMPLEMENTATION = "hidrop_loop"


@dataclass(frozen=True, kw_only=True)
class Events:
    """What happens in a run: a schedule, or as much of it as some pass has carried out."""

    inject: int | None
    """None: vision tokens never enter."""
    prune: tuple[int, ...] = ()
    exit: int | None = None
    positions: str = "persistent"

    @classmethod
    def of(cls, schedule: Schedule) -> "Events":
        """All of a schedule."""
        return cls(
            inject=schedule.inject,
            prune=tuple(schedule.prune),
            exit=schedule.exit,
            positions=schedule.positions,
        )


@dataclass(kw_only=True)
class RowStates:
    """One row's run."""

    columns: list[Tensor] = field(default_factory=list)
    """For each layer the columns [n] of the tokens that it saw."""
    hidden: list[Tensor] = field(default_factory=list)
    """For each layer the hidden states [n, D] that it handed on."""
    output: Tensor | None = None
    """The last layer's, normalised [n, D]."""
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Filter layer -> columns [n] of the vision tokens before the prune, their scores fp32 [n]."""

    def detached(self) -> "RowStates":
        """Without what a backward needs."""
        return RowStates(
            columns=self.columns,
            hidden=[states.detach() for states in self.hidden],
            output=None if self.output is None else self.output.detach(),
            scores=self.scores,
        )

    def at(self, wanted: Tensor) -> "RowStates":
        """Of the tokens at some columns alone."""
        there = [torch.isin(columns, wanted) for columns in self.columns]
        return RowStates(
            columns=[c[t] for c, t in zip(self.columns, there, strict=True)],
            hidden=[h[t] for h, t in zip(self.hidden, there, strict=True)],
            output=None if self.output is None else self.output[there[-1]],
        )


def run_loop(
    model: Any,
    batch: Batch,
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
    decoder = model.get_decoder()
    with _watched_attention(decoder.config) as attention, torch.set_grad_enabled(grad):
        rows = [_row(batch, row, None if new is None else new[row]) for row in range(batch.rows)]
        return [_run_row(decoder, row, batch.schedule.score, events, attention) for row in rows]


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


def _row(batch: Batch, row: int, new: Tensor | None) -> _Row:
    tensors = batch.tensors
    text, vision = (batch.row_columns(name, row) for name in ("text", "vision"))
    text_embeds = tensors["text_embeds"][row, : len(text)]
    is_vision = tensors["column_is_vision"][row]
    ids = tensors["column_position_ids"][row]
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
        vision_embeds=tensors["vision_embeds"][row, : len(vision)],
        is_vision=is_vision,
        ids=ids,
        queries=tensors["query_columns"][row],
        keep={k: int(tensors[f"keep_{k}"][row]) for k in batch.schedule.prune},
    )


class _Attention:
    """Attention of one unpadded row, which remembers the queries and keys it was given."""

    def __init__(self) -> None:
        self.columns: Tensor | None = None
        self.query: Tensor | None = None
        self.key: Tensor | None = None

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
        assert self.columns is not None
        self.scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        self.query, self.key = query, key
        distance = self.columns[:, None] - self.columns[None, :]
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scale)
        return out.transpose(1, 2).contiguous(), None


@contextmanager
def _watched_attention(config: Any) -> Iterator[_Attention]:
    attention = _Attention()
    with capture._LOCK:
        configured = config._attn_implementation
        ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION] = attention
        config._attn_implementation = _IMPLEMENTATION
        try:
            yield attention
        finally:
            config._attn_implementation = configured
            del ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION]


def _run_row(
    decoder: Any, row: _Row, score: str, events: Events, attention: _Attention
) -> RowStates:
    states = RowStates()
    columns, hidden, is_vision = row.text, row.text_embeds, row.is_vision
    renumbered = False
    for layer, module in enumerate(_layers(decoder)):
        if layer == events.inject:
            columns, order = torch.cat([columns, row.vision]).sort()
            hidden = torch.cat([hidden, row.vision_embeds])[order]
        if layer in events.prune:
            ids = _position_ids(row, columns, events.positions, renumbered)
            with torch.no_grad():
                _run_layer(decoder, module, hidden, columns, ids, attention)
                scores = _scores(attention, columns, row.queries, score)
            candidates = is_vision[columns].nonzero().flatten()
            states.scores[layer] = columns[candidates], scores[candidates]
            keep = min(row.keep[layer], len(candidates))
            order = scores[candidates].argsort(descending=True, stable=True)
            stays = ~is_vision[columns]
            stays[candidates[order[:keep]]] = True
            columns, hidden = columns[stays], hidden[stays]
            renumbered = events.positions == "compact"
        if layer == events.exit:
            stays = ~is_vision[columns]
            columns, hidden = columns[stays], hidden[stays]
            renumbered = events.positions == "compact"
        ids = _position_ids(row, columns, events.positions, renumbered)
        hidden = _run_layer(decoder, module, hidden, columns, ids, attention)
        states.columns.append(columns)
        states.hidden.append(hidden)
    states.output = decoder.norm(hidden)
    return states


def _position_ids(row: _Row, columns: Tensor, positions: str, renumbered: bool) -> Tensor:
    if renumbered:
        return torch.arange(len(columns), device=columns.device)
    ids = row.ids
    if positions == "group":
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


def _scores(attention: _Attention, columns: Tensor, query_columns: Tensor, score: str) -> Tensor:
    """Softmax over each query row's whole causal row, mean (square) over heads, then over the rows."""
    assert attention.query is not None
    assert attention.key is not None
    wanted = query_columns[query_columns >= 0]
    places = torch.searchsorted(columns, wanted)
    groups = attention.query.shape[1] // attention.key.shape[1]
    key = repeat_heads(attention.key, groups).float()
    logits = attention.query[:, :, places].float() @ key.transpose(2, 3) * attention.scale
    visible = columns[None, :] <= wanted[:, None]
    weights = logits.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    if score.endswith("l2"):
        weights = weights.square()
    return weights.mean(dim=1)[0].mean(dim=0)


def _layers(decoder: Any) -> nn.ModuleList:
    count = decoder.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise AssertionError("a decoder that was captured has a list of its layers")
