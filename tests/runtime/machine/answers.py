"""Independent answers: what a fresh model gives, by the eager reference of a schedule, or by transformers itself.

    prompted = Prompted(model, schedule, inputs)     # every row by itself, with the cache of its layers
    prompted.logits()                                # [B, L, V], zero at pads and dropped tokens
    tail = following(model, schedule, prompted.tails[0], token)
    generated(model, schedule, inputs["input_ids"], mask, prompted.tails, num_beams=2)

`generate` is transformers' own, over a forward that looks each row's tokens up in the reference: so beams, sampling,
early ends and processors are those of any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from tests.support.reference import (
    IGNORE,
    LayerCache,
    Reference,
    RowResult,
    split_batch,
)

Ratios = Mapping[int, float] | None
"""Share of its tokens that each filter layer drops, where it was learned."""


@dataclass(frozen=True)
class Closeness:
    """Tolerances of one dtype, and when a choice between two values is too close to call."""

    rtol: float
    atol: float
    """Relative to the largest value."""
    gap: float
    """Least distance of the tokens at a cut, relative to the lowest kept score."""
    margin: float
    """Least distance of the two best logits, relative to the largest."""


CLOSENESS = {
    torch.float32: Closeness(1e-3, 1e-4, 1e-4, 1e-3),
    torch.float64: Closeness(1e-4, 1e-5, 1e-4, 1e-3),
    torch.bfloat16: Closeness(5e-2, 8e-2, 0.3, 0.2),
}


class RatioReference(Reference):
    """The reference under learned ratios: ceil(N * (1 - ratio)) of N tokens stay, at least one."""

    def __init__(self, model: Any, schedule: Any, ratios: Ratios) -> None:
        super().__init__(model, schedule)
        self.ratios = ratios

    def _cut(self, layer: Any, *given: Any) -> Any:
        *others, alive, queries, count, last, past = given
        if self.ratios is not None:
            k = next(k for k, other in enumerate(self.decoder.layers) if other is layer)
            wanted = math.ceil(len(alive) * (1 - self.ratios[k]) - 1e-3)
            count = min(max(1, wanted), len(alive))
        return super()._cut(layer, *others, alive, queries, count, last, past)


@dataclass(frozen=True)
class Tail:
    """The end of one row: what the next token sees."""

    caches: list[LayerCache]
    column: int
    logits: Tensor
    """[V], of the next token."""


class Prompted:
    """The rows of a prompt, each by itself, as the reference answers them."""

    @torch.no_grad()
    def __init__(
        self, model: Any, schedule: Any, inputs: dict[str, Tensor], ratios: Ratios
    ) -> None:
        reference = RatioReference(model, schedule, ratios)
        self.rows = split_batch(model, inputs)
        self.results: list[RowResult] = [
            reference.prefill(row.input_ids, row.features) for row in self.rows
        ]
        self.width = inputs["input_ids"].shape[1]
        self.gap = min(result.gap for result in self.results)
        self.tails = [Tail(r.caches, r.length, r.logits[-1]) for r in self.results]

    def logits(self) -> Tensor:
        """Return [B, L, V], zero at pads and at tokens that were dropped."""
        return padded(self.rows, self.results, self.width)


def padded(rows: Sequence[Any], results: Sequence[RowResult], width: int) -> Tensor:
    """Put the logits of each row at its columns -> [B, width, V]."""
    full = []
    for row, result in zip(rows, results, strict=True):
        zeros = result.logits.new_zeros(width, result.logits.shape[-1])
        full.append(zeros.index_copy(0, row.places[result.surviving], result.logits))
    return torch.stack(full)


@torch.no_grad()
def following(model: Any, schedule: Any, tail: Tail, token: int) -> Tail:
    """Return the row with one more token, by the weights that the model has now."""
    caches = list(tail.caches)
    logits = Reference(model, schedule)._decode(token, tail.column, caches)
    return Tail(caches, tail.column + 1, logits)


@dataclass
class Generated:
    sequences: Tensor
    tails: dict[tuple[int, tuple[int, ...]], Tail]
    """By row and its new tokens."""
    margin: float
    """The least of all steps, relative to the largest logit."""


@torch.no_grad()
def generated(
    model: Any, schedule: Any, ids: Tensor, mask: Tensor, tails: Sequence[Tail], **options: Any
) -> Generated:
    """Generate behind `tails`, a row each of `ids`, by transformers' own `generate` of `model`."""
    known = {(row, ()): tail for row, tail in enumerate(tails)}
    found = Generated(ids, known, math.inf)

    def tail_of(row: int, tokens: tuple[int, ...]) -> Tail:
        if (row, tokens) not in known:
            before = tail_of(row, tokens[:-1])
            known[row, tokens] = following(model, schedule, before, tokens[-1])
        return known[row, tokens]

    def forward(input_ids: Tensor | None = None, **_: Any) -> Any:
        assert input_ids is not None
        copies = len(input_ids) // len(tails)
        new = input_ids[:, ids.shape[1] :].tolist()
        logits = torch.stack([tail_of(b // copies, tuple(row)).logits for b, row in enumerate(new)])
        best = logits.float().topk(2).values
        margins = (best[:, 0] - best[:, 1]) / logits.float().abs().amax(dim=1)
        found.margin = min(found.margin, float(margins.min()))
        return LlavaCausalLMOutputWithPast(logits=logits[:, None])  # type: ignore[arg-type]

    model.forward = forward
    try:
        found.sequences = model.generate(
            input_ids=ids, attention_mask=mask, use_cache=False, **options
        )
    finally:
        del model.forward
    return found


def supervised_loss(
    model: Any, schedule: Any, inputs: dict[str, Tensor], ratios: Ratios
) -> tuple[Tensor, float]:
    """Return the loss of a batch with labels, differentiable, and the least gap of its cuts."""
    reference = RatioReference(model, schedule, ratios)
    rows = split_batch(model, inputs)
    results = [reference.prefill(row.input_ids, row.features, row.labels) for row in rows]
    logits = padded(rows, results, inputs["input_ids"].shape[1])
    labels, real = inputs["labels"], inputs["attention_mask"].bool()
    chosen = ((labels[:, 1:] != IGNORE) & real[:, :-1]).nonzero().tolist()
    logged = logits.log_softmax(-1)
    terms = [-logged[b, i, labels[b, i + 1]] for b, i in chosen]
    return torch.stack(terms).mean(), min(result.gap for result in results)


def assert_close(found: Tensor, expected: Tensor, closeness: Closeness, what: str) -> None:
    """Assert equal dtype, shape and values, as close as the dtype lets them be."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found,
        expected,
        rtol=closeness.rtol,
        atol=closeness.atol * scale + 1e-7,
        msg=lambda m: f"{what}: {m}",
    )
