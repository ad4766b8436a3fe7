"""The eager reference: one sample, no padding, one layer after another, everything written out.

Over 400 lines in one file, which imports nothing of the product and is to be read from end to end.

    for k, layer in enumerate(layers):
        tokens = inject / prune / exit at the input of layer k
        hidden = hidden + attention(norm(hidden), mask by original columns)
        hidden = hidden + mlp(norm(hidden))

It shares no code with the compiler that it judges. It calls HF's sub-modules (norms, projections, MLP, rotary table,
embedding, head, image features) but never an HF layer, attention, mask or cache.

A *column* is a token's index in the row after its pads were stripped; it never changes, and masks are made of columns. An
*id* is what RoPE sees; `compact` changes it on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE = -100

Model = Any
"""A `LlavaForConditionalGeneration` in eval mode, compiled or not: only its sub-modules are called."""

Features = Tensor | Sequence[Tensor] | None
"""Projector outputs of one row's images: one `[tokens, hidden]` per image, stacked or as a list."""


class ScheduleLike(Protocol):
    @property
    def inject(self) -> int: ...
    @property
    def prune(self) -> Mapping[int, int | float]: ...
    @property
    def exit(self) -> int | None: ...
    @property
    def positions(self) -> str: ...

    # And, if not "last_token", `score: str`; if not "half_up", `rounding: str`; if not None, `merge: str`.


@dataclass
class LayerCache:
    """What decode needs of one layer. One row per token, in the order of the columns."""

    keys: Tensor
    """`[tokens, kv_heads, head_dim]`, after RoPE."""
    values: Tensor
    columns: list[int]
    ids: list[int]


@dataclass(frozen=True)
class Cut:
    """One prune of one row."""

    candidates: list[int]
    """Vision columns before the cut."""
    scores: Tensor
    """fp32, one per candidate."""
    kept: list[int]
    """Vision columns after the cut, ascending."""
    gap: float
    """(lowest kept - highest dropped) / lowest kept; infinite if nothing is at stake. Near 0 the cut is ambiguous:
    another order of floating-point operations may choose another token."""
    nearest_gap: float = math.inf
    """Least difference of cosines between the kept token that a dropped one is merged into and the next."""


@dataclass(frozen=True)
class RowResult:
    length: int
    text: list[int]
    """Columns of the text stream."""
    vision: list[int]
    """Columns of the vision stream."""
    queries: list[int]
    """Columns whose attention rows are the score."""
    columns: list[list[int]]
    """Per layer: the columns it works on."""
    position_ids: list[list[int]]
    """Per layer: the ids of these columns."""
    cuts: dict[int, Cut]
    """Per filter layer; empty for a row without a vision stream."""
    hidden: Tensor
    """`[surviving, hidden]`, after the final norm."""
    logits: Tensor
    """`[surviving, vocabulary]`."""
    caches: list[LayerCache]
    gates: dict[int, Tensor]
    """Per filter layer: a one for each of `cuts[k].kept`, by which its hidden state, and its value in this layer's
    attention, were multiplied. Their gradient is that of the token's survival."""

    @property
    def surviving(self) -> list[int]:
        """Columns of `hidden` and `logits`."""
        return self.columns[-1]

    @property
    def tokens(self) -> list[int]:
        return [len(columns) for columns in self.columns]

    @property
    def kept(self) -> dict[int, list[int]]:
        return {k: cut.kept for k, cut in self.cuts.items()}

    @property
    def scores(self) -> dict[int, Tensor]:
        return {k: cut.scores for k, cut in self.cuts.items()}

    @property
    def kv_lengths(self) -> list[int]:
        """Grows as `generate` decodes."""
        return [len(cache.columns) for cache in self.caches]

    @property
    def gap(self) -> float:
        """The smallest of all cuts."""
        gaps = [gap for cut in self.cuts.values() for gap in (cut.gap, cut.nearest_gap)]
        return min(gaps, default=math.inf)


@dataclass(frozen=True)
class Generation:
    tokens: list[int]
    """The new tokens, the end-of-sequence token included."""
    margins: list[float]
    """Per new token: best logit minus second best."""
    prompt: RowResult


class Reference:
    def __init__(self, model: Model, schedule: ScheduleLike) -> None:
        if schedule.positions not in ("persistent", "compact", "group"):
            raise ValueError(f"unknown positions {schedule.positions!r}")
        self.schedule = schedule
        self.model = model
        self.decoder = model.model.language_model
        self.image_token: int = model.config.image_token_id
        self.score: str = getattr(schedule, "score", "last_token")
        self.scoring: str = getattr(schedule, "scoring", "prompt")
        self.rounding: str = getattr(schedule, "rounding", "half_up")
        self.merge: str | None = getattr(schedule, "merge", None)
        self.soft: bool = getattr(schedule, "rank", "hard") == "soft"
        """Whether scores carry gradient."""
        self.gate_of: Callable[[int, Cut], Tensor] | None = None
        """Filter layer and cut -> gates of `cut.kept`, in place of ones."""

    def prefill(
        self,
        input_ids_row: Tensor,
        features_row: Features = None,
        labels: Tensor | None = None,
        *,
        past: Sequence[LayerCache] | None = None,
        start: int = 0,
    ) -> RowResult:
        """Differentiable; `input_ids_row` and `labels` are 1-D, without pads, labels not shifted.

        `past` is what earlier turns left, whose `start` tokens stand before these; columns of the result count from the
        first of these, those of its caches from the first of all. For positions="persistent" alone.
        """
        schedule, length = self.schedule, len(input_ids_row)
        assert past is None or schedule.positions == "persistent"
        features, images = _flatten(features_row)
        embeddings = self._embed(input_ids_row, features)

        is_image = input_ids_row.eq(self.image_token).tolist()
        needed = needed_columns(length, labels)
        text = [c for c in range(length) if not is_image[c] or c in needed]
        queries = query_columns(length, labels, self.score, text)
        vision = [c for c in range(length) if is_image[c] and c not in needed]
        ids = dict(zip(range(length), range(start, start + length), strict=True))
        if self.scoring == "agnostic" and vision:
            queries = [c for c in vision if c + 1 not in vision]
        ends = queries
        if schedule.positions == "group":
            ids |= {column: rank for rank, column in enumerate(text)}

        columns, hidden = list(text), embeddings[text]
        alive: list[int] = []
        cuts: dict[int, Cut] = {}
        gates: dict[int, Tensor] = {}
        all_columns, all_ids, caches = [], [], []
        last: tuple[Any, Tensor, list[int]] | None = None

        for k, layer in enumerate(self.decoder.layers):
            changed = False
            if k == schedule.inject:
                hidden = torch.cat([hidden, embeddings[vision]])
                order = sorted(range(length), key=(columns + vision).__getitem__)
                columns, hidden, alive = list(range(length)), hidden[order], list(vision)
            if k in schedule.prune and vision:
                count = keep_count(
                    schedule.prune[k], images, len(vision), len(alive), self.rounding
                )
                if self.scoring == "agnostic":
                    queries = [
                        max(c for c in alive if c <= end) for end in ends if min(alive) <= end
                    ]
                at = k - 1 if self.score == "previous_layer" else k
                before = None if past is None else past[at].keys
                cuts[k] = self._cut(
                    layer, hidden, columns, ids, alive, queries, count, last, before
                )
                if self.merge is not None:
                    hidden, cuts[k] = self._merged(layer, hidden, columns, ids, cuts[k])
                alive, changed = cuts[k].kept, True
            if k == schedule.exit:
                alive, changed = [], True
            factors: Tensor | None = None
            if changed:
                survivors = sorted(set(text) | set(alive))
                hidden = hidden[[columns.index(c) for c in survivors]]
                columns = survivors
                if k in schedule.prune and alive:
                    gates[k] = self._gate(k, cuts[k])
                    factors = _spread(gates[k], [columns.index(c) for c in alive], hidden)
                    hidden = hidden * factors[:, None]
                if schedule.positions == "compact":
                    ids = {column: rank for rank, column in enumerate(columns)}
            layer_ids = [ids[c] for c in columns]
            there = _empty_cache(layer.self_attn, hidden) if past is None else past[k]
            last = layer, hidden, layer_ids
            standing = [start + c for c in columns]
            hidden, cache = self._layer(layer, hidden, standing, layer_ids, there, factors)
            all_columns.append(columns)
            all_ids.append(layer_ids)
            caches.append(cache)

        hidden = self.decoder.norm(hidden)
        return RowResult(
            length=length,
            text=text,
            vision=vision,
            queries=queries,
            columns=all_columns,
            position_ids=all_ids,
            cuts=cuts,
            hidden=hidden,
            logits=self.model.lm_head(hidden),
            caches=caches,
            gates=gates,
        )

    def generate(
        self,
        input_ids_row: Tensor,
        features_row: Features = None,
        max_new_tokens: int = 8,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> list[int]:
        return self.trace(input_ids_row, features_row, max_new_tokens, eos_token_id).tokens

    @torch.no_grad()
    def trace(
        self,
        input_ids_row: Tensor,
        features_row: Features = None,
        max_new_tokens: int = 8,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Generation:
        """`generate` with the evidence: greedy, the end-of-sequence token is the last one returned."""
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        prompt = self.prefill(input_ids_row, features_row)
        logits = prompt.logits[-1]
        tokens: list[int] = []
        margins: list[float] = []
        while True:
            best = logits.float().topk(2).values
            tokens.append(int(logits.float().argmax()))
            margins.append(float(best[0] - best[1]))
            if len(tokens) == max_new_tokens or tokens[-1] in ends:
                return Generation(tokens, margins, prompt)
            logits = self._decode(tokens[-1], prompt.length + len(tokens) - 1, prompt.caches)

    def _decode(self, token: int, column: int, caches: list[LayerCache]) -> Tensor:
        weight = self.decoder.embed_tokens.weight
        hidden = self.decoder.embed_tokens(torch.tensor([token], device=weight.device))
        for k, layer in enumerate(self.decoder.layers):
            # The last column of the prompt is in the text stream, so it is in every layer, and under each of the
            # three numberings the new token follows it.
            following = caches[k].ids[-1] + 1
            hidden, caches[k] = self._layer(layer, hidden, [column], [following], caches[k])
        return self.model.lm_head(self.decoder.norm(hidden))[-1]

    def _embed(self, input_ids_row: Tensor, features: Tensor | None) -> Tensor:
        embeddings = self.decoder.embed_tokens(input_ids_row)
        places = input_ids_row.eq(self.image_token).nonzero().flatten()
        given = 0 if features is None else len(features)
        if len(places) != given:
            raise ValueError(
                f"{len(places)} image placeholders in the row, but {given} image features"
            )
        if features is None:
            return embeddings
        return embeddings.index_copy(0, places, features.to(embeddings))

    def _layer(
        self,
        layer: Any,
        hidden: Tensor,
        columns: list[int],
        ids: list[int],
        past: LayerCache,
        factors: Tensor | None = None,
    ) -> tuple[Tensor, LayerCache]:
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        queries, keys, values = self._project(attention, normed, ids)
        if factors is not None:
            values = values * factors[:, None, None]
        cache = LayerCache(
            keys=torch.cat([past.keys, keys]),
            values=torch.cat([past.values, values]),
            columns=past.columns + columns,
            ids=past.ids + ids,
        )
        window = window_of(attention)
        visible = torch.tensor(
            [[key <= query and (window is None or key > query - window) for key in cache.columns]
             for query in columns],
            device=hidden.device,
        )  # fmt: skip
        logits = _similarity(queries, cache.keys, attention.scaling).masked_fill(
            ~visible, -math.inf
        )
        weights = logits.softmax(-1, dtype=torch.float32).to(hidden.dtype)
        mixed = torch.einsum("hqk,khd->qhd", weights, _repeat(cache.values, queries))
        hidden = hidden + attention.o_proj(mixed.reshape(len(columns), -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), cache

    def _project(
        self, attention: Any, normed: Tensor, ids: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after RoPE, and values: `[tokens, heads, head_dim]` each."""
        shape = (len(ids), -1, attention.head_dim)
        queries = attention.q_proj(normed).view(shape)
        keys = attention.k_proj(normed).view(shape)
        values = attention.v_proj(normed).view(shape)
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        cos, sin = self.decoder.rotary_emb(normed, torch.tensor([ids], device=normed.device))
        return _rotate(queries, cos[0], sin[0]), _rotate(keys, cos[0], sin[0]), values

    def _merged(
        self, layer: Any, hidden: Tensor, columns: list[int], ids: dict[int, int], cut: Cut
    ) -> tuple[Tensor, Cut]:
        """Average each dropped token into the kept one whose key points most nearly where its own does."""
        assert self.merge == "nearest_key"
        normed = layer.input_layernorm(hidden)
        _, keys, _ = self._project(layer.self_attn, normed, [ids[c] for c in columns])
        at = {column: keys[columns.index(column)].detach().float().flatten() for column in cut.kept}
        groups = {column: [column] for column in cut.kept}
        gap = math.inf
        for column in sorted(set(cut.candidates) - set(cut.kept)):
            key = keys[columns.index(column)].detach().float().flatten()
            near = [float(key @ k / (key.norm() * k.norm())) for k in at.values()]
            groups[cut.kept[near.index(max(near))]].append(column)
            best = sorted(near, reverse=True)
            gap = min([gap, *(best[0] - other for other in best[1:2])])
        rows = list(hidden)
        for column, group in groups.items():
            states = [hidden[columns.index(c)].float() for c in group]
            rows[columns.index(column)] = (sum(states[1:], states[0]) / len(states)).to(hidden)
        return torch.stack(rows), replace(cut, nearest_gap=gap)

    def _gate(self, k: int, cut: Cut) -> Tensor:
        if self.gate_of is not None:
            return self.gate_of(k, cut)
        return torch.ones(len(cut.kept), requires_grad=True)

    def _cut(self, *args: Any) -> Cut:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.soft):
            return self._scored_cut(*args)

    def _scored_cut(
        self,
        layer: Any,
        hidden: Tensor,
        columns: list[int],
        ids: dict[int, int],
        alive: list[int],
        query_columns: list[int],
        count: int,
        last: tuple[Any, Tensor, list[int]] | None = None,
        past: Tensor | None = None,
    ) -> Cut:
        """Score the vision columns `alive` and keep the `count` best.

        By this layer's own attention; by that of the layer before, which ran on the same columns and is `last`, with
        its input and its ids; or by how much that layer changed them. `past` are keys of earlier turns, which queries
        attend to as well.
        """
        layer_ids, states = [ids[c] for c in columns], hidden
        if self.score in ("previous_layer", "state_change"):
            assert last is not None
            layer, states, layer_ids = last
        module = layer.self_attn
        queries, keys, _ = self._project(module, layer.input_layernorm(states), layer_ids)
        score = torch.zeros(len(columns), device=hidden.device)
        seen = torch.zeros(len(columns), dtype=torch.bool)
        for query in query_columns:
            row = queries[columns.index(query)].float()[None]
            future = torch.tensor([c > query for c in columns], device=hidden.device)
            logits = _similarity(row, keys.float(), module.scaling).masked_fill(future, -math.inf)
            if past is not None:
                earlier = _similarity(row, past.float(), module.scaling)
                logits = torch.cat([logits, earlier], dim=-1)
            attention = logits.softmax(-1)[:, 0, : len(columns)]
            if self.score.endswith("_l2"):
                attention = attention**2
            score = score + attention.mean(0) / len(query_columns)
            seen |= ~future.cpu()
        if self.score == "state_change":
            score, seen = (hidden.float() - states.float()).square().sum(-1).sqrt(), ~seen | True

        at = [columns.index(c) for c in alive]
        scores = score[at].cpu()
        # Stable, so that of equal scores the lower column comes first.
        ranking = scores.argsort(descending=True, stable=True).tolist()
        kept = sorted(alive[i] for i in ranking[:count])
        gap = math.inf
        if count < len(alive):
            lowest, highest = ranking[count - 1], ranking[count]
            # Columns behind every query row score exactly 0 in any implementation: a tie, but no ambiguity.
            if seen[at[lowest]] or seen[at[highest]]:
                low, high = scores[lowest].item(), scores[highest].item()
                gap = (low - high) / low if low > 0 else 0.0
        return Cut(list(alive), scores, kept, gap)


def query_columns(
    length: int, labels: Tensor | None, score: str = "last_token", text: Sequence[int] = ()
) -> list[int]:
    """The column before each answer, or before the last one, or all text that is no answer; else the last column.

    `text` is the text stream, of which "all_text" chooses.
    """
    values = [IGNORE] * length if labels is None else labels.tolist()
    if score in ("all_text", "all_text_l2"):
        return [c for c in text if values[c] == IGNORE] or [length - 1]
    starts = [i - 1 for i in range(1, length) if values[i - 1] == IGNORE and values[i] != IGNORE]
    if score == "last_token_one_round":
        starts = starts[-1:]
    elif score not in ("last_token", "last_token_l2", "previous_layer", "state_change"):
        raise ValueError(f"the reference knows no score {score!r}")
    return starts or [length - 1]


def needed_columns(length: int, labels: Tensor | None) -> set[int]:
    """Columns whose output is asked for: the last one, and all that predict a supervised token."""
    values = [IGNORE] * length if labels is None else labels.tolist()
    return {length - 1} | {i for i in range(length - 1) if values[i + 1] != IGNORE}


def keep_count(
    keep: int | float, images: int, vision: int, alive: int, rounding: str = "half_up"
) -> int:
    """An int counts per image; a float is a fraction of the vision stream as injected, at least 1."""
    if isinstance(keep, int):
        return min(keep * images, alive)
    rule = {"half_up": ROUND_HALF_UP, "half_even": ROUND_HALF_EVEN, "floor": ROUND_FLOOR}[rounding]
    exact = Decimal(str(keep)) * vision
    return min(max(1, int(exact.to_integral_value(rule))), alive)


def window_of(attention: Any) -> int | None:
    """The sliding window of one attention module: Qwen decides per layer, Mistral in its config."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def _flatten(features: Features) -> tuple[Tensor | None, int]:
    if features is None or len(features) == 0:
        return None, 0
    return torch.cat(list(features)), len(features)


def _empty_cache(attention: Any, like: Tensor) -> LayerCache:
    heads = attention.k_proj.out_features // attention.head_dim
    nothing = like.new_empty(0, heads, attention.head_dim)
    return LayerCache(nothing, nothing, [], [])


def _spread(gate: Tensor, places: list[int], hidden: Tensor) -> Tensor:
    """A factor for every token: `gate` at `places`, one elsewhere."""
    ones = hidden.new_ones(len(hidden))
    return ones.index_put((torch.tensor(places),), gate.to(hidden))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on `[tokens, heads, head_dim]`: dimension i is paired with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _repeat(kv: Tensor, queries: Tensor) -> Tensor:
    """Grouped-query attention: key head j serves the query heads j * groups, ..., (j + 1) * groups - 1."""
    return kv.repeat_interleave(queries.shape[1] // kv.shape[1], dim=1)


def _similarity(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    return torch.einsum("qhd,khd->hqk", queries, _repeat(keys, queries)) * scaling


@dataclass(frozen=True)
class BatchRow:
    places: Tensor
    """Where the row's tokens are in the padded row."""
    input_ids: Tensor
    features: list[Tensor]
    labels: Tensor | None


def split_batch(model: Model, inputs: Mapping[str, Tensor]) -> list[BatchRow]:
    """The rows of a batch padded on either side, without their pads, each with the features of its own images."""
    ids, labels = inputs["input_ids"], inputs.get("labels")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    features: list[Tensor] = []
    if (pixels := inputs.get("pixel_values")) is not None:
        given = {"pixel_values": pixels}
        if "image_sizes" in inputs:
            given["image_sizes"] = inputs["image_sizes"]
        features = list(model.model.get_image_features(**given, return_dict=True).pooler_output)
    rows = []
    for b in range(len(ids)):
        places = mask[b].bool().nonzero().flatten()
        row = ids[b, places]
        missing = int(row.eq(model.config.image_token_id).sum())
        mine: list[Tensor] = []
        while missing > 0 and features:
            mine.append(features.pop(0))
            missing -= len(mine[-1])
        rows.append(BatchRow(places, row, mine, None if labels is None else labels[b, places]))
    if features:
        raise ValueError(f"{len(features)} images belong to no row of the batch")
    return rows


def reference_rows(
    model: Model, schedule: ScheduleLike, inputs: Mapping[str, Tensor]
) -> list[RowResult]:
    """`prefill` of every row; with `labels` in `inputs`, as in training."""
    reference = Reference(model, schedule)
    return [
        reference.prefill(row.input_ids, row.features, row.labels)
        for row in split_batch(model, inputs)
    ]


def reference_logits(model: Model, schedule: ScheduleLike, inputs: Mapping[str, Tensor]) -> Tensor:
    """`[batch, length, vocabulary]`, zero at dropped positions and at pads; differentiable."""
    reference = Reference(model, schedule)
    width = inputs["input_ids"].shape[1]
    full = []
    for row in split_batch(model, inputs):
        result = reference.prefill(row.input_ids, row.features, row.labels)
        zeros = result.logits.new_zeros(width, result.logits.shape[-1])
        full.append(zeros.index_copy(0, row.places[result.surviving], result.logits))
    return torch.stack(full)


@torch.no_grad()
def reference_generations(
    model: Model,
    schedule: ScheduleLike,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    eos: int | Sequence[int] | None = None,
) -> list[Generation]:
    reference = Reference(model, schedule)
    return [
        reference.trace(row.input_ids, row.features, max_new_tokens, eos)
        for row in split_batch(model, inputs)
    ]


def reference_generate(
    model: Model,
    schedule: ScheduleLike,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    eos: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each row; rows that ended early are shorter."""
    return [g.tokens for g in reference_generations(model, schedule, inputs, max_new_tokens, eos)]
