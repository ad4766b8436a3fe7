"""Training: the loss and every parameter's gradient are those of the eager reference.

Schedules, scores, batches, paddings and labels are drawn at random. The reference's loss is written out from its logits,
position by position; its gradients reach the vision tower and the projector through the image features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.schedule.schedule import SCORES
from tests.support.models import (
    IMAGE,
    IMAGE_TOKEN,
    batch,
    random_labels,
    rows,
    schedules,
    tiny_llava,
)
from tests.support.reference import IGNORE, reference_logits, reference_rows
from tests.support.runtimes import compiled_eagerly, runtime_in


class Spec(NamedTuple):
    backbone: str
    sliding_window: int | None
    kv_heads: int
    image_tokens: int


SPECS = [
    Spec("llama", None, 2, 9),
    Spec("mistral", 6, 2, 9),
    Spec("qwen2", 6, 4, 4),
    Spec("qwen3", None, 1, 9),
]
LAYERS = 3
SCHEDULES_PER_MODEL = 6
BATCHES_PER_SCHEDULE = 6
LEAST_CASES_PER_MODEL = 30
MOST_AMBIGUOUS = 0.05
AMBIGUOUS = 1e-5
LABELS = ("spans", "spans", "one round", "after an image", "all", "some rows", "none")
"""How a batch is supervised."""
HELD_ELSEWHERE = ("random", "value_similarity", "raters", "gravity_raters", "twig")
"""Scores that are drawn, or have references of their own in tests/methods."""

pytestmark = pytest.mark.usefixtures("one_capture_a_model")
each_model = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s)))


@pytest.fixture(scope="module")
def model_of() -> Callable[[Spec], Any]:
    models: dict[Spec, Any] = {}

    def model(spec: Spec) -> Any:
        if spec not in models:
            options = spec._asdict()
            made = tiny_llava(options.pop("backbone"), num_layers=LAYERS, **options)
            models[spec] = made.train()
        return models[spec]

    return model


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(rows()),
        "padding": draw(st.sampled_from(["left", "right"])),
        "pad_to": draw(st.sampled_from([None, 15, 40])),
        "seed": draw(st.integers(0, 9)),
        "labels": draw(st.sampled_from(LABELS)),
        "items": draw(st.sampled_from([None, None, 7])),
    }


def labelled(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    case = dict(case)
    kind, items = case.pop("labels"), case.pop("items")
    inputs: dict[str, Any] = batch(model, **case)
    inputs["labels"] = labels_of(kind, inputs, case["seed"])
    return inputs if items is None else inputs | {"num_items_in_batch": torch.tensor(items)}


def labels_of(kind: str, inputs: dict[str, Tensor], seed_: int) -> Tensor:
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    if kind == "all":
        return ids.masked_fill(~real, IGNORE)
    if kind == "after an image":
        behind = ids.roll(1, dims=1).eq(IMAGE_TOKEN) & ids.ne(IMAGE_TOKEN) & real
        return ids.masked_fill(~behind, IGNORE)
    if kind == "none":
        return torch.full_like(ids, IGNORE)
    labels = random_labels(inputs, seed=seed_, spans=1 if kind == "one round" else 3)
    if kind == "some rows":
        labels[::2] = IGNORE
    return labels


def reference_loss(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Each supervised token is predicted by the column before it; the first of a row by none, pad or not."""
    labels, real = inputs["labels"], inputs["attention_mask"].bool()
    supervised = ((labels[:, 1:] != IGNORE) & real[:, :-1]).nonzero().tolist()
    logged = logits.log_softmax(-1)
    terms = [-logged[b, i, labels[b, i + 1]] for b, i in supervised]
    total = torch.stack(terms).sum() if terms else 0.0 * logits.sum()
    items = inputs.get("num_items_in_batch")
    return total / (len(terms) if items is None else items)


def gradients_or_none(model: Any, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if "hidrop" not in name}


def compare_gradients(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {n for n, g in ours.items() if g is None} == {
        n for n, g in expected.items() if g is None
    }
    for name, gradient in expected.items():
        if gradient is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                ours[name],
                gradient,
                rtol=1e-4,
                atol=1e-4 * scale + 1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@each_model
def test_random_schedules_give_loss_and_gradients_of_the_reference(
    spec: Spec, model_of: Callable[[Spec], Any]
) -> None:
    assert len(SPECS) * LEAST_CASES_PER_MODEL >= 100
    model, seen = model_of(spec), Counter[str]()
    scores = [score for score in SCORES if score not in HELD_ELSEWHERE]

    @seed(SPECS.index(spec))
    @settings(max_examples=SCHEDULES_PER_MODEL, phases=(Phase.explicit, Phase.generate))
    @given(
        schedules(LAYERS, image_tokens=spec.image_tokens, scores=scores),
        st.lists(cases(), min_size=BATCHES_PER_SCHEDULE, max_size=BATCHES_PER_SCHEDULE),
    )
    def run(arguments: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        schedule = hidrop.Schedule(**arguments)
        clear = 0
        with compiled_eagerly(model, schedule):
            for case in drawn:
                inputs = labelled(model, case)
                expected_rows = reference_rows(model, schedule, inputs)
                known = all(row.gap > AMBIGUOUS for row in expected_rows)
                seen["clear" if known else "ambiguous"] += 1
                if known:
                    compare(model, schedule, inputs)
                    clear += 1
        assume(clear)

    run()
    assert seen["clear"] >= LEAST_CASES_PER_MODEL
    assert seen["ambiguous"] <= MOST_AMBIGUOUS * seen.total()


def compare(model: Any, schedule: hidrop.Schedule, inputs: dict[str, Any]) -> None:
    logits = reference_logits(model, schedule, inputs)
    loss = reference_loss(logits, inputs)
    expected = gradients_or_none(model, loss)

    output = model(**inputs)
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-5, equal_nan=True)
    if loss.isfinite():
        compare_gradients(gradients_or_none(model, output.loss), expected)
    compare_rows(output, logits)


def compare_rows(output: Any, expected: Tensor) -> None:
    """`logits` [B, T, V] are the rows of the full ones at `logit_columns` [B, T]; the sentinel L names none."""
    columns, length = output.logit_columns, expected.shape[1]
    assert output.logits.shape == (*columns.shape, expected.shape[2])
    b, t = (columns < length).nonzero().unbind(1)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(
        output.logits[b, t], expected[b, columns[b, t]], rtol=1e-4, atol=2e-5 * scale
    )


def test_random_scores_keep_the_count_and_draw_anew_every_time() -> None:
    model = tiny_llava(num_layers=LAYERS)
    hidrop.compile(model, "inject=1,prune=1:4,score=random", backend="eager").train()
    inputs = batch(model, [[5, IMAGE, 6, 7], [8, 9, IMAGE, IMAGE]], padding="right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] != 7, IGNORE)
    runtime = runtime_in(model)
    losses = set()
    for _ in range(8):
        losses.add(model(**inputs).loss.item())
        layout = runtime.last_layout
        assert layout is not None
        assert layout.vision_counts["prune_1"] == [4, 8]
        assert layout.counts["prune_1"] == [3 + 4, 3 + 8]
    assert len(losses) > 4, "the answer sees the same image tokens in most calls"
