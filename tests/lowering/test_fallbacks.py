"""A compiler that fails costs speed and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import fx

from tests.support.lowered import answer, compiled_llama
from tests.support.models import IMAGE, batch


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records
        if r.name == "hidrop_fx" and r.levelno >= logging.WARNING
    ]  # fmt: skip


def test_a_backend_that_fails_costs_speed_only(
    reference: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine\nand a second line")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    model, runtime = compiled_llama()
    inputs = batch(model, [[5, 6, IMAGE, 7], [8, IMAGE, 9, 10, 11]])
    assert answer(model, inputs) == answer(reference, inputs)
    lines = warnings_in(caplog)
    bodies = [
        "decode program",
        "prefill keys body 1",
        "prefill layer body 1",
        "prefill layer body 2",
    ]
    assert sorted(line.split(" runs uncompiled: ")[0] for line in lines) == bodies
    assert all("BackendCompilerFailed" in line and "\n" not in line for line in lines)
    assert all("no compiler on this machine" in line for line in lines)
    assert sorted(runtime.programs.log.fallbacks) == sorted(lines)
    assert runtime.programs.log.entries == []
    answer(model, inputs)
    assert len(warnings_in(caplog)) == len(bodies)


def test_training_through_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    losses = []
    for backend in ("aot_eager", "eager"):
        model, _ = compiled_llama(backend=backend)
        inputs = batch(model, [[5, 6, IMAGE, 7]])
        loss = model(**inputs, labels=inputs["input_ids"].clone(), use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        assert model.get_decoder().layers[0].mlp.up_proj.weight.grad is not None
    torch.testing.assert_close(losses[0], losses[1])


def test_the_limit_of_variants_costs_speed_only(
    reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, runtime = compiled_llama()
    one = batch(model, [[5, 6, IMAGE, 7]])
    three = batch(model, [[5, 6, IMAGE, 7], [8, 9, IMAGE, 4], [5, 4, IMAGE, 5]])
    with torch._dynamo.config.patch(recompile_limit=1):
        assert answer(model, one) == answer(reference, one)
        assert warnings_in(caplog) == []
        assert answer(model, three) == answer(reference, three)
    lines = warnings_in(caplog)
    assert sorted(line.split(" runs uncompiled: ")[0] for line in lines) == [
        "decode program", "prefill keys body 1", "prefill layer body 1", "prefill layer body 2",
    ]  # fmt: skip
    assert all("FailOnRecompileLimitHit" in line and "\n" not in line for line in lines)
    assert runtime.programs.log.fallbacks == lines
    assert answer(model, one) == answer(reference, one)
