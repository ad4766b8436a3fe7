"""Compilations: how many there are for mixed lengths and batches, and how they are announced."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from hidrop_fx.lowering.compile_log import CompileEntry
from hidrop_fx.runtime.runtime import Runtime
from tests.support import counter
from tests.support.lowered import WIDTH, answer, compiled_llama
from tests.support.models import FIRST_WORD, IMAGE, IMAGE_TOKEN, Row, batch


def mixed_calls(model: Any, count: int) -> list[dict[str, Tensor]]:
    """Batches of 1 to 4 rows, 0 to 3 images and 1 to 12 words a row, padded on either side."""
    choose = random.Random(7)

    def words() -> list[int | str]:
        return [choose.randrange(FIRST_WORD, IMAGE_TOKEN) for _ in range(choose.randint(1, 4))]

    def row() -> Row:
        return [item for _ in range(choose.randint(0, 3)) for item in [*words(), IMAGE]] + words()

    return [
        batch(
            model,
            [row() for _ in range(choose.randint(1, 4))],
            padding=choose.choice(["left", "right"]),
        )
        for _ in range(count)
    ]


def test_mixed_calls_compile_no_more_than_announced(reference: Any) -> None:
    model, _ = compiled_llama()
    calls = mixed_calls(model, 50)
    assert {len(c["input_ids"]) for c in calls} == {1, 2, 3, 4}
    with counter.expect() as made:
        for inputs in calls:
            assert answer(model, inputs) == answer(reference, inputs)
    found = counter.names(made.compiled)
    # One variant for a batch of 1 and one for all others; decode is two programs, with masks and without.
    assert found == {
        "decode program": found.get("decode program"),
        "prefill keys body 1": 2,
        "prefill layer body 1": 2,
        "prefill layer body 2": 2,
    }
    assert 2 <= found["decode program"] <= 4
    with counter.expect(compiled=0):
        for inputs in calls:
            answer(model, inputs)


@pytest.mark.slow
def test_with_gradients_it_compiles_once_more_and_not_for_every_length(reference: Any) -> None:
    model, _ = compiled_llama()
    prompts = [[5, *range(10, 10 + extra), IMAGE, 7, 8] for extra in range(6)]
    answer(model, batch(model, [prompts[0]]), 2)
    bodies = {"prefill layer body 1": 1, "prefill layer body 2": 1, "prefill score body 1": 1}
    with counter.expect(compiled=bodies):
        for prompt in prompts:
            # As `model(**inputs)` is called: with gradients, and with a cache.
            inputs = batch(model, [prompt])
            expected = reference(**inputs, logits_to_keep=1).logits
            torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, expected)


def test_training_after_generating_compiles_once_for_all_lengths(reference: Any) -> None:
    model, _ = compiled_llama()
    prompts = [[5, *range(10, 10 + extra), IMAGE, 7, 8] for extra in range(6)]
    answer(model, batch(model, [prompts[0]]), 2)
    bodies = {"train layer body 1": 1, "train layer body 2": 1, "train score body 1": 1}
    with counter.expect(compiled=bodies):
        for prompt in prompts:
            inputs = batch(model, [prompt])
            inputs["labels"] = torch.where(
                inputs["input_ids"] == IMAGE_TOKEN, -100, inputs["input_ids"]
            )
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            torch.testing.assert_close(loss, reference(**inputs, use_cache=False).loss)


def test_compilations_are_logged_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    model, runtime = compiled_llama()
    heard: list[CompileEntry] = []
    runtime.programs.log.listener = heard.append
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        answer(model, batch(model, [[5, IMAGE, 7]]), 2)
    # Twice each: when it starts, and when it is done.
    started, done = heard[::2], heard[1::2]
    assert [(e.name, e.shapes) for e in started] == [(e.name, e.shapes) for e in done]
    assert all(e.seconds is None for e in started)
    assert done == runtime.programs.log.entries
    assert Counter(entry.name for entry in done) == {
        "decode program": 1,
        "prefill keys body 1": 1,
        "prefill layer body 1": 1,
        "prefill layer body 2": 1,
    }
    assert runtime.programs.log.seconds == pytest.approx(sum(e.seconds or 0.0 for e in done))
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("compiled ")]
    assert len(lines) == len(done)
    assert lines[0].startswith(f"compiled {done[0].name} [1, *, {WIDTH}] in ")


@dataclasses.dataclass(frozen=True)
class Real:
    model: Any
    runtime: Runtime
    answers: list[list[list[int]]]
    compiled: dict[str, int]


@pytest.fixture(scope="module")
def inductor() -> Real:
    """One model through Inductor, and its answers to three calls."""
    model, runtime = compiled_llama(backend="inductor")
    with counter.expect() as made:
        answers = [answer(model, inputs) for inputs in inductor_calls(model)]
    return Real(model, runtime, answers, counter.names(made.compiled))


def inductor_calls(model: Any) -> list[dict[str, Tensor]]:
    return [
        batch(model, [[5, 6, IMAGE, 7]]),
        batch(model, [[8, 9, 10, IMAGE, 4, 11, IMAGE, 5, 6]]),
        batch(model, [[5, IMAGE, 7, 8, 9]]),
    ]


# One worker, so that the fixture is made once.
@pytest.mark.xdist_group("inductor")
def test_inductor_gives_the_tokens_of_the_eager_backend(inductor: Real, reference: Any) -> None:
    assert inductor.answers == [answer(reference, inputs) for inputs in inductor_calls(reference)]


@pytest.mark.xdist_group("inductor")
def test_inductor_compiles_a_body_once_for_all_lengths(inductor: Real) -> None:
    assert inductor.compiled == {
        "decode program": 1,
        "prefill keys body 1": 1,
        "prefill layer body 1": 1,
        "prefill layer body 2": 1,
    }
