"""A compiled model computes what the eager reference computes: tokens, logits, and what every layer works on.

Schedules, batches and paddings are drawn at random; each schedule is held against several batches, since making its
programs takes a hundred times as long as running them. A case is one schedule with one batch of one to three rows.
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
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.kv.token_log import INVALID
from tests.support.models import batch, random_labels, rows, schedules, tiny_llava
from tests.support.reference import (
    IGNORE,
    BatchRow,
    Generation,
    RowResult,
    reference_generations,
    reference_logits,
    reference_rows,
    split_batch,
)
from tests.support.runtimes import compiled_eagerly, runtime_in


class Spec(NamedTuple):
    backbone: str
    sliding_window: int | None
    kv_heads: int
    num_layers: int
    image_tokens: int


SPECS = [
    Spec("llama", None, 4, 3, 9),
    Spec("llama", None, 2, 4, 9),
    Spec("mistral", None, 2, 3, 4),
    Spec("mistral", 6, 2, 3, 9),
    Spec("mistral", 14, 4, 3, 4),
    Spec("qwen2", None, 4, 3, 4),
    Spec("qwen2", 6, 2, 4, 9),
    Spec("qwen3", None, 2, 3, 9),
    Spec("qwen3", 6, 1, 3, 4),
]
SCORES = ("last_token", "last_token", "previous_layer", "state_change")
NEW_TOKENS = 5
SCHEDULES_PER_MODEL = 6
BATCHES_PER_SCHEDULE = 6
LEAST_CASES_PER_MODEL = 34
MOST_AMBIGUOUS = 0.05
"""Share of all cases."""
AMBIGUOUS = 1e-5
"""Where two scores, or two logits, are closer than this, rounding decides which one wins."""

pytestmark = pytest.mark.usefixtures("one_capture_a_model")
each_model = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s)))
Check = Callable[[dict[str, Any], list[dict[str, Any]]], None]


@pytest.fixture(scope="module")
def model_of() -> Callable[[Spec], Any]:
    models: dict[Spec, Any] = {}

    def model(spec: Spec) -> Any:
        if spec not in models:
            options = spec._asdict()
            models[spec] = tiny_llava(options.pop("backbone"), **options)
        return models[spec]

    return model


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of `batch`."""
    return {
        "rows": draw(rows()),
        "padding": draw(st.sampled_from(["left", "right"])),
        "pad_to": draw(st.sampled_from([None, 15, 40])),
        "seed": draw(st.integers(0, 9)),
    }


def check_random(spec: Spec, check: Check, schedules_: int, batches_: int) -> None:
    """Run `check` on random schedules, each with some random batches."""
    # Without shrinking, which would make programs for hundreds of schedules on a failure.
    phases = (Phase.explicit, Phase.generate)

    @seed(SPECS.index(spec))
    @settings(max_examples=schedules_, phases=phases)
    @given(
        schedules(spec.num_layers, image_tokens=spec.image_tokens, scores=SCORES),
        st.lists(batches(), min_size=batches_, max_size=batches_),
    )
    def run(schedule: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        check(schedule, drawn)

    run()


@each_model
def test_random_schedules_generate_what_the_reference_generates(
    spec: Spec, model_of: Callable[[Spec], Any]
) -> None:
    assert len(SPECS) * LEAST_CASES_PER_MODEL >= 300
    model, cases = model_of(spec), Counter[str]()

    def check(arguments: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        schedule = hidrop.Schedule(**arguments)
        clear = []
        for case in drawn:
            inputs = batch(model, **case)
            expected = reference_generations(model, schedule, inputs, NEW_TOKENS)
            known = not any(map(ambiguous, expected))
            cases["clear" if known else "ambiguous"] += 1
            clear += [(inputs, expected)] if known else []
        assume(clear)
        with compiled_eagerly(model, schedule):
            for inputs, expected in clear:
                output = model.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=None,
                    return_dict_in_generate=True,
                )
                new = output.sequences[:, inputs["input_ids"].shape[1] :]
                assert new.tolist() == [generation.tokens for generation in expected]
                check_layout(model, schedule, [generation.prompt for generation in expected])
                prompts = split_batch(model, inputs)
                check_cache(model, output.past_key_values, prompts, expected)

    check_random(spec, check, SCHEDULES_PER_MODEL, BATCHES_PER_SCHEDULE)
    assert cases["clear"] >= LEAST_CASES_PER_MODEL
    assert cases["ambiguous"] <= MOST_AMBIGUOUS * cases.total()


@each_model
@torch.no_grad()
def test_random_schedules_give_the_logits_of_the_reference(
    spec: Spec, model_of: Callable[[Spec], Any]
) -> None:
    model, cases = model_of(spec), Counter[str]()

    def check(arguments: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        schedule = hidrop.Schedule(**arguments)
        with compiled_eagerly(model, schedule):
            for case in drawn:
                inputs = batch(model, **case)
                rows_ = reference_rows(model, schedule, inputs)
                known = all(row.gap > AMBIGUOUS for row in rows_)
                cases["clear" if known else "ambiguous"] += 1
                if not known:
                    continue
                output = model(**inputs)
                compare_logits(output.logits, reference_logits(model, schedule, inputs))
                check_layout(model, schedule, rows_)
                for k, layer in enumerate(output.past_key_values.layers):
                    assert layer.filled == max(2, *(row.tokens[k] for row in rows_))

    check_random(spec, check, 2, 4)
    assert cases["ambiguous"] <= MOST_AMBIGUOUS * cases.total()


@each_model
def test_random_schedules_give_the_supervised_logits_of_the_reference(
    spec: Spec, model_of: Callable[[Spec], Any]
) -> None:
    """With labels, every position that predicts one comes through, and each answer scores the vision tokens."""
    model, cases = model_of(spec), Counter[str]()

    def check(arguments: dict[str, Any], drawn: list[dict[str, Any]]) -> None:
        schedule = hidrop.Schedule(**arguments)
        with compiled_eagerly(model, schedule):
            for case in drawn:
                inputs = batch(model, **case)
                inputs["labels"] = labels_for(inputs, case["seed"])
                rows_ = reference_rows(model, schedule, inputs)
                known = all(row.gap > AMBIGUOUS for row in rows_)
                cases["clear" if known else "ambiguous"] += 1
                if not known:
                    continue
                output = model(**inputs)
                expected = reference_logits(model, schedule, inputs)
                compare_logits(output.logits, expected)
                # Padding predicts no token, whatever stands behind it.
                pads = inputs["attention_mask"][:, :-1] == 0
                labels = inputs["labels"].clone()
                labels[:, 1:][pads] = -100
                loss = model.loss_function(expected, labels, expected.shape[-1])
                torch.testing.assert_close(output.loss, loss, equal_nan=True)

    check_random(spec, check, 2, 4)
    assert cases["ambiguous"] <= MOST_AMBIGUOUS * cases.total()


def labels_for(inputs: dict[str, Tensor], seed_: int) -> Tensor:
    """Mostly answers; sometimes every real token, those of images too."""
    if seed_ % 3 == 0:
        return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    return random_labels(inputs, seed=seed_)


def ambiguous(generation: Generation) -> bool:
    scale = float(generation.prompt.logits.abs().max())
    return generation.prompt.gap < AMBIGUOUS or min(generation.margins) < AMBIGUOUS * scale


def compare_logits(ours: Tensor, expected: Tensor) -> None:
    """`expected` is exactly zero at dropped positions and at pads."""
    assert ours.shape == expected.shape
    present = expected.ne(0).any(-1)
    assert not ours[~present].any()
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5 * scale)


def stream_names(schedule: hidrop.Schedule, num_layers: int) -> list[str]:
    """The stream of each layer."""
    names = []
    for k in range(num_layers):
        name = "text"
        if schedule.inject <= k:
            name = f"inject_{schedule.inject}"
        name = next((f"prune_{p}" for p in reversed(list(schedule.prune)) if p <= k), name)
        if schedule.exit is not None and schedule.exit <= k:
            name = f"exit_{schedule.exit}"
        names.append(name)
    return names


def check_layout(model: Any, schedule: hidrop.Schedule, expected: list[RowResult]) -> None:
    """Tokens per layer and row."""
    runtime = runtime_in(model)
    layout = runtime.last_layout
    assert isinstance(layout, Layout)
    for k, name in enumerate(stream_names(schedule, len(expected[0].columns))):
        assert layout.counts[name] == [row.tokens[k] for row in expected], f"layer {k}"


def check_cache(
    model: Any, cache: HidropCache, rows_: list[BatchRow], expected: list[Generation]
) -> None:
    """Tokens in each layer's cache, and which prompt tokens they are."""
    new = NEW_TOKENS - 1  # the last one is never fed
    for k, layer in enumerate(cache.layers):
        tokens = [generation.prompt.tokens[k] for generation in expected]
        assert layer.filled == max(2, *tokens) + new, f"layer {k}"
        columns = cache.log.columns[layer.segment]
        assert columns.shape == (len(rows_), layer.filled)
        for b, (row, generation) in enumerate(zip(rows_, expected, strict=True)):
            valid = columns[b][columns[b] != INVALID]
            assert len(valid) == generation.prompt.kv_lengths[k], f"layer {k}, row {b}"
            kept = row.places[generation.prompt.columns[k]]
            assert valid[: len(kept)].tolist() == kept.tolist(), f"layer {k}, row {b}"
