"""What a schedule means for one row of any class: HF's own layers, one after another, on the tokens that are there.

    for k, layer in enumerate(layers):
        tokens = inject / prune / exit at the input of layer k
        hidden = layer(hidden, mask by original columns, RoPE of the original position ids)

It calls HF's decoder layers, embedding, head and features, and nothing of the product. Attention weights, from which
vision tokens are scored, are those that HF's eager attention returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal
from typing import Any

import torch
from torch import Tensor

from tests.support.families.batches import RowOf
from tests.support.families.case import PAD, Case, causal

IGNORE = -100


@dataclass(frozen=True)
class Result:
    columns: list[int]
    """Columns that came through all layers."""
    logits: Tensor
    """[n, vocabulary] at them."""
    tokens: list[int]
    """Tokens of each layer."""
    gap: float
    """The smallest difference of a kept and a dropped score, relative; near 0 the cut is ambiguous."""


def text_model(model: Any) -> Any:
    """The layers' module: that of Llama 4 is inside a model with a head."""
    found = model.get_decoder()
    return found.model if hasattr(found, "lm_head") else found


class FamilyReference:
    def __init__(self, model: Any, schedule: Any, case: Case) -> None:
        self.model, self.schedule, self.case = model, schedule, case
        self.decoder = text_model(model)
        self.config = self.decoder.config

    def run(
        self,
        row: RowOf,
        embeds: Tensor,
        labels: Tensor | None = None,
        new: Sequence[int] = (),
    ) -> Result:
        """A row's prompt and tokens behind it; `embeds` [n, D] has the features at their places."""
        prompt = len(row.ids)
        length = prompt + len(new)
        ids = row.position_ids
        if new:
            words = [PAD if token in self.case.silent else token for token in new]
            added = self.decoder.get_input_embeddings()(torch.tensor(words))
            embeds = torch.cat([embeds, added])
            following = ids[..., -1].max() + 1 + torch.arange(len(new))
            ids = torch.cat([ids, following.expand(*ids.shape[:-1], -1)], dim=-1)
        embeds = embeds * getattr(self.config, "embedding_multiplier", 1.0)
        needed = _needed(prompt, labels)
        vision = [c for c in row.vision.nonzero().flatten().tolist() if c not in needed]
        text = [c for c in range(length) if c not in vision]
        queries = _queries(prompt, labels)

        self.types = [*row.types, *[self.case.new_type] * len(new)]
        columns, alive, gap = list(text), [], math.inf
        hidden, tokens = embeds[text], []
        for k, layer in enumerate(self.decoder.layers):
            if k in row.additions:  # to those that are there, vision places of the text stream too
                hidden = hidden + self._added(row, k, columns, hidden)
            if k == self.schedule.inject:
                order = sorted(text + vision)
                entering = embeds[vision]
                for missed in self._missed(row):
                    entering = entering + self._added(row, missed, vision, entering)
                joined = torch.cat([hidden, entering])
                places = [(columns + vision).index(c) for c in order]
                columns, alive, hidden = order, list(vision), joined[places]
            if k in self.schedule.prune and vision:
                count = _count(self.schedule.prune[k], row.items, len(vision), len(alive))
                if count < len(alive):
                    scores = self._scores(layer, k, hidden, columns, ids, queries)
                    ranked = sorted(alive, key=lambda c: (-scores[c], c))
                    low, high = scores[ranked[count - 1]], scores[ranked[count]]
                    gap = min(gap, (low - high) / max(low, 1e-30))
                    alive = sorted(ranked[:count])
                    columns, hidden = _only(columns, hidden, set(text) | set(alive))
            if k == self.schedule.exit:
                alive = []
                columns, hidden = _only(columns, hidden, set(text))
            tokens.append(len(columns))
            hidden = self._layer(layer, k, hidden, columns, ids)[0]
        names = ("norm", "final_layernorm", "embedding_norm")
        norm = next(getattr(self.decoder, name) for name in names if hasattr(self.decoder, name))
        logits = self.case.logits(self.model.get_output_embeddings()(norm(hidden)))
        return Result(columns, logits, tokens, gap)

    @torch.no_grad()
    def generate(self, row: RowOf, embeds: Tensor, count: int) -> tuple[list[int], float]:
        """Greedy tokens, and the smallest margin of any choice; real tokens are counted, as `generate` does."""
        if self.case.counts_padding:
            row = replace(row, position_ids=torch.arange(len(row.ids)))
        new: list[int] = []
        margin = math.inf
        while len(new) < count:
            found = self.run(row, embeds, new=new)
            best = found.logits[-1].topk(2).values
            margin = min(margin, float(best[0] - best[1]), found.gap)
            new.append(int(found.logits[-1].argmax()))
        return new, margin

    def _missed(self, row: RowOf) -> list[int]:
        """The additions that a token gets as it enters."""
        inject = self.schedule.inject
        if self.schedule.deepstack == "at_inject":
            return [k for k in row.additions if k <= inject]
        return [k for k in row.additions if k == inject and self.case.deepstack == "inputs"]

    def _added(self, row: RowOf, layer: int, columns: list[int], like: Tensor) -> Tensor:
        places = row.vision.nonzero().flatten().tolist()
        found = torch.zeros_like(like)
        at = [i for i, column in enumerate(columns) if column in places]
        rows = [places.index(columns[i]) for i in at]
        return found.index_copy(0, torch.tensor(at, dtype=torch.long), row.additions[layer][rows])

    def embeds(self, row: RowOf) -> Tensor:
        known = row.ids.masked_fill(row.vision, self.case.filler)
        embeds = self.decoder.get_input_embeddings()(known)
        for token, vector in row.words.items():
            embeds = torch.where((row.ids == token)[:, None], vector, embeds)
        features, at = row.features.to(embeds), row.vision.nonzero().flatten()
        if self.case.adds_features:
            return embeds.index_add(0, at, features)
        return embeds.index_copy(0, at, features)

    def _layer(
        self,
        layer: Any,
        index: int,
        hidden: Tensor,
        columns: list[int],
        ids: Tensor,
        *,
        scoring: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return what a layer hands on, and its attention weights [H, n, n]."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[index] == "conv":
            return layer(hidden[None], attention_mask=None)[0], hidden
        if (
            kinds is not None and kinds[index] == "linear_attention"
        ):  # a state of these tokens alone
            return layer(hidden[None], None, attention_mask=None)[0], hidden
        sliding = kinds is not None and kinds[index] == "sliding_attention"
        window = self.config.sliding_window if sliding else None
        places = torch.tensor(columns)
        # A score is over the whole causal row, whatever the layer's window and blocks.
        sees = causal if scoring else self.case.sees
        if kinds is not None and kinds[index] == "chunked_attention" and not scoring:
            sees, window = in_chunk, self.config.attention_chunk_size
        window = None if scoring else window
        seen = torch.tensor([[sees(self.types, q, k, window) for k in columns] for q in columns])
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        own = ids[..., places].unsqueeze(-2)
        weights: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            weights.append(output[1])

        handle = layer.self_attn.register_forward_hook(keep)
        tuned = _tempered(layer.self_attn, own)
        try:
            output = layer(
                hidden[None],
                attention_mask=mask[None, None],
                position_ids=own,
                position_embeddings=self._rotation(index, hidden[None], own),
                use_cache=False,
            )
        finally:
            handle.remove()
            for undo in tuned:
                undo()
        states = output[0] if isinstance(output, tuple) else output
        return states[0] if states.dim() == 3 else states, weights[0][0]

    def _rotation(self, index: int, hidden: Tensor, ids: Tensor) -> Any:
        thetas = getattr(self.config, "layer_rope_theta", None)
        if thetas is not None and not thetas[index]:
            return None
        if hasattr(self.decoder, "rotary_emb_unscaled"):
            scaled = index in self.config.rope_scaling_layers
            rope = self.decoder.rotary_emb if scaled else self.decoder.rotary_emb_unscaled
            return rope(hidden, ids)
        if hasattr(self.decoder.rotary_emb, "layer_types"):
            kind = self.config.layer_types[index]
            if self.config.rope_parameters[kind] is None:
                return None
            return self.decoder.rotary_emb(hidden, ids, kind)
        return self.decoder.rotary_emb(hidden, ids)

    def _scores(
        self,
        layer: Any,
        index: int,
        hidden: Tensor,
        columns: list[int],
        ids: Tensor,
        queries: list[int],
    ) -> dict[int, float]:
        with torch.no_grad():
            weights = self._layer(layer, index, hidden.detach(), columns, ids, scoring=True)[
                1
            ].float()
        rows = weights[:, [columns.index(q) for q in queries]]
        mean = rows.mean(dim=(0, 1)).tolist()
        return dict(zip(columns, mean, strict=True))


def in_chunk(types: Sequence[int], query: int, key: int, window: int | None) -> bool:
    """Llama 4: back to the start of the query's chunk."""
    return key <= query and query // window == key // window


def _tempered(attention: Any, ids: Tensor) -> list[Callable[[], None]]:
    """Let Llama 4's layers without RoPE scale queries by position ids, where HF counts the rows that are there."""
    if not getattr(attention, "attn_temperature_tuning", False) or attention.use_rope:
        return []

    def scaled(module: Any, args: Any, output: Tensor) -> Tensor:
        steps = ((ids[0].float() + 1) / attention.floor_scale).floor()
        return output * (steps.log1p() * attention.attn_scale + 1)[:, None]

    handle = attention.q_proj.register_forward_hook(scaled)
    attention.attn_temperature_tuning = False

    def undo() -> None:
        handle.remove()
        attention.attn_temperature_tuning = True

    return [undo]


def _only(columns: list[int], hidden: Tensor, kept: set[int]) -> tuple[list[int], Tensor]:
    at = [i for i, c in enumerate(columns) if c in kept]
    return [columns[i] for i in at], hidden[at]


def _needed(length: int, labels: Tensor | None) -> set[int]:
    found = {length - 1}
    if labels is not None:
        found |= {c - 1 for c in range(1, length) if int(labels[c]) != IGNORE}
    return found


def _queries(length: int, labels: Tensor | None) -> list[int]:
    if labels is None:
        return [length - 1]
    asked = [int(value) != IGNORE for value in labels]
    return [c - 1 for c in range(1, length) if asked[c] and not asked[c - 1]] or [length - 1]


def _count(keep: float, items: int, vision: int, alive: int) -> int:
    if isinstance(keep, int):
        return min(keep * items, alive)
    exact = (Decimal(str(keep)) * vision + Decimal("0.5")).to_integral_value(ROUND_FLOOR)
    return min(max(1, int(exact)), alive)
