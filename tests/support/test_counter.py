"""The counter of what is made: it counts models under test, and says what it counted."""

from __future__ import annotations

import pytest
import torch

import hidrop_fx as hidrop
from tests.support import counter
from tests.support.models import IMAGE, batch, tiny_llava


def test_expect_counts_captures_programs_compilations_and_recordings() -> None:
    model = hidrop.compile(
        tiny_llava(num_layers=2), "inject=1", backend="aot_eager", cuda_graphs=True
    )
    inputs = batch(model, [[5, IMAGE, 6]])
    with counter.expect(captures=1, programs=2, compiled=range(1, 9), recorded=2) as made:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert made.captures == ["eval"]
    assert made.programs == ["prefill", "decode"]
    assert counter.names(made.recorded) == {"prefill graph": 1, "decode graph": 1}
    assert set(counter.names(made.compiled)) == {"prefill layer body 1", "decode program"}
    with counter.expect(captures=0, programs=0, compiled={}, recorded=0):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_expect_fails_with_the_expected_the_found_and_the_names() -> None:
    model = hidrop.compile(tiny_llava(num_layers=2), "identity", backend="aot_eager")
    with (
        pytest.raises(
            AssertionError,
            match=r"captures: expected 0, found 1:\n  eval\n"
            r"compiled: expected \{'prefill layer body 1': 2\}, found 1:\n  prefill layer body 1 \(.*\)$",
        ),
        counter.expect(captures=0, compiled={"prefill layer body 1": 2}),
        torch.no_grad(),
    ):
        model(**batch(model, [[5, IMAGE, 6]]))


def test_expect_counts_bodies_that_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    model = hidrop.compile(tiny_llava(num_layers=2), "identity", backend="aot_eager")
    with (
        pytest.raises(AssertionError, match=r"fallbacks: expected 0, found 1:\n  prefill layer"),
        counter.expect(),
        torch.no_grad(),
    ):
        model(**batch(model, [[5, IMAGE, 6]]))


def test_an_error_within_the_block_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), counter.expect(captures=1):
        raise ValueError("mine")
