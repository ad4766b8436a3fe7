"""A reference for decoders of any kind: transformers' own layers, one row at a time, tokens chosen in between.

    row = LayerwiseRow(model, schedule, input_ids, features)
    row.logits                  # [surviving, vocabulary], at the columns row.columns[-1]

It imports nothing of the product. One forward of the untouched decoder over the whole row shows what each layer is
given: what comes out of the embeddings, RoPE's tables, the mask. A layer that is to see fewer tokens is then called with
the rows of these that belong to its tokens. Attention of the scores is that of the eager function in the layer's module:
its own weights, whatever caps or sinks they went through.

Tokens behind the prompt see of each layer what the prompt left there, so that they are run along with it: the cuts of the
prompt stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import keep_count, needed_columns, query_columns, split_batch


@dataclass
class LayerwiseRow:
    """One row of a batch under a schedule with persistent positions; differentiable."""

    model: Any
    schedule: Any
    ids: Tensor
    """[length], without pads."""
    features: list[Tensor]
    labels: Tensor | None = None
    prompt: int | None = None
    """Columns before the first that was generated."""
    kept: dict[int, list[int]] | None = None
    """Vision columns behind each prune, where they were chosen already."""
    columns: list[list[int]] = field(init=False)
    logits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        decoder = self.model.model.language_model
        length, end = len(self.ids), self.prompt or len(self.ids)
        is_image = self.ids.eq(self.model.config.image_token_id).tolist()
        needed = needed_columns(end, None if self.labels is None else self.labels)
        vision = [c for c in range(end) if is_image[c] and c not in needed]
        text = [c for c in range(length) if c not in vision]
        queries = query_columns(end, self.labels, text=text)
        given = self._given(decoder)
        entered = given[0][0]
        self.columns, chosen, alive = [], {}, []
        columns, hidden = list(text), entered[text]
        for k, layer in enumerate(decoder.layers):
            if k == self.schedule.inject:
                alive = list(vision)
                merged = sorted(columns + vision)
                joined = torch.cat([hidden, entered[vision]])
                hidden = joined[[(columns + vision).index(c) for c in merged]]
                columns = merged
            before = list(columns)
            if k in self.schedule.prune and vision:
                if self.kept is not None:
                    alive = self.kept[k]
                else:
                    count = keep_count(
                        self.schedule.prune[k], len(self.features), len(vision), len(alive)
                    )
                    scores = self._scores(layer, hidden, columns, given[k], queries)
                    order = sorted(alive, key=lambda c: (-scores[columns.index(c)], c))
                    alive = sorted(order[:count])
                chosen[k] = alive
            if k == self.schedule.exit:
                alive = []
            columns = sorted([*text, *alive]) if k >= self.schedule.inject else columns
            hidden = hidden[[before.index(c) for c in columns]]
            hidden = _call(layer, hidden, columns, given[k])[0]
            self.columns.append(columns)
        self.kept = chosen
        self.logits = self.model.lm_head(_norm(decoder)(hidden))

    def _given(self, decoder: Any) -> list[tuple[Tensor, dict[str, Any]]]:
        """What every layer is given in a forward of the whole row: hidden states [length, D], keywords."""
        embeds = decoder.get_input_embeddings()(self.ids[None])
        if self.features:
            places = self.ids.eq(self.model.config.image_token_id)
            places[self.prompt or len(places) :] = False  # a word that was generated
            embeds = embeds.clone()
            embeds[0, places] = torch.cat(self.features).to(embeds)
        found: list[tuple[Tensor, dict[str, Any]]] = []

        def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            found.append((hidden[0], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        hooks = [
            layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers
        ]
        try:
            decoder(inputs_embeds=embeds, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _scores(
        self, layer: Any, hidden: Tensor, columns: list[int], given: Any, queries: list[int]
    ) -> list[float]:
        """The mean attention of the query rows, as the layer computes it without a window."""
        kwargs = dict(given[1])
        kwargs["attention_mask"] = _causal(given[1]["attention_mask"])
        with torch.no_grad():
            weights = _call(layer, hidden, columns, (given[0], kwargs))[1]
        rows = [columns.index(c) for c in queries]
        scores: list[float] = weights[0][:, rows].float().mean(dim=(0, 1)).tolist()
        return scores


def _call(
    layer: Any, hidden: Tensor, columns: list[int], given: tuple[Tensor, dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Call a layer on some columns [n, D]; return its hidden states and its attention weights."""
    kwargs = {name: _rows(value, columns, len(given[0])) for name, value in given[1].items()}
    kept: list[Any] = []
    names = ("self_attn", "conv", "linear_attn", "mamba", "mixer")
    mixer = next(m for name in names if (m := getattr(layer, name, None)) is not None)
    hook = mixer.register_forward_hook(lambda m, a, output: kept.append(output))
    try:
        output = layer(hidden[None], **kwargs)
    finally:
        hook.remove()
    states = output[0] if isinstance(output, tuple) else output
    weights = kept[0][1] if isinstance(kept[0], tuple) else states  # others have none
    return states[0], weights


def _rows(value: Any, columns: list[int], length: int) -> Any:
    """Select the columns in whatever has one row, or one row and one column, for each of them."""
    if isinstance(value, tuple):
        return tuple(_rows(part, columns, length) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 4:
        return value[:, :, columns][:, :, :, columns]
    assert value.shape[1] == length
    return value[:, columns]


def _causal(mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[-1])
    shown = places[:, None] >= places
    return torch.where(shown, 0.0, torch.finfo(mask.dtype).min)[None, None]


def layerwise_rows(
    model: Any, schedule: Any, inputs: Mapping[str, Tensor], labels: Tensor | None = None
) -> list[tuple[Tensor, LayerwiseRow]]:
    """Run every row of a padded batch; return the places of its tokens in the batch with each."""
    given = dict(inputs) if labels is None else {**inputs, "labels": labels}
    return [
        (row.places, LayerwiseRow(model, schedule, row.input_ids, row.features, row.labels))
        for row in split_batch(model, given)
    ]


@torch.no_grad()
def layerwise_tokens(
    model: Any, schedule: Any, inputs: Mapping[str, Tensor], count: int
) -> list[list[int]]:
    """Generate greedily, whatever ends the answer."""
    found = []
    for row in split_batch(model, inputs):
        ids, kept, prompt = row.input_ids, None, len(row.input_ids)
        tokens: list[int] = []
        while len(tokens) < count:
            run = LayerwiseRow(model, schedule, ids, row.features, prompt=prompt, kept=kept)
            kept = run.kept
            tokens.append(int(run.logits[-1].argmax()))
            ids = torch.cat([ids, torch.tensor(tokens[-1:])])
        found.append(tokens)
    return found


def _norm(decoder: Any) -> Any:
    names = ("norm", "embedding_norm", "final_layernorm", "norm_f")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name))
