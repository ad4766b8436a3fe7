"""Ratios as parameters: copies, casts, pickles, and compiling again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.gradients import gradients_of_step
from tests.support.models import tiny_llava
from tests.support.ratios import DTOPK, HARD, new, supervised_batch, trained
from tests.support.runtimes import last_layout

SOFT = DTOPK + ",rank=soft"


def test_the_state_dict_stays_that_of_the_class(tmp_path: Path) -> None:
    model, plain = new(DTOPK), tiny_llava(num_layers=3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert any(name == "hidrop_ratios.values" for name, _ in model.named_parameters())
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()]
)
def test_ratios_keep_fp32_and_their_value(cast: Callable[[Any], Any]) -> None:
    model = new(DTOPK)
    with torch.no_grad():
        model.hidrop_ratios.values.fill_(1 - 215 / 576)
    model.hidrop_ratios.values.grad = torch.full((2,), 1 / 3)
    before, values = model.hidrop_ratios.values.detach().clone(), model.hidrop_ratios.values
    cast(model)
    assert model.hidrop_ratios.values is values, "an optimizer holds this one"
    assert values.dtype == torch.float32
    assert torch.equal(values, before)
    assert values.grad is not None
    assert values.grad.dtype == torch.float32


def test_a_bf16_model_learns_ratios() -> None:
    model = trained(DTOPK, dtype=torch.bfloat16)
    inputs = supervised_batch(model)
    found = gradients_of_step(model, inputs)["hidrop_ratios.values"]
    assert found.dtype == torch.float32
    assert found.abs().min() > 0


def test_a_copy_learns_ratios_of_its_own() -> None:
    model = new(DTOPK)
    twin = copy.deepcopy(model)
    inputs = supervised_batch(model)
    with torch.no_grad():
        twin.hidrop_ratios.values += 1 / 9
    model(**inputs)
    twin(**inputs)
    assert runtime_of(twin) is not runtime_of(model)
    assert last_layout(model).vision_counts["prune_1"] == [6, 6, 0]
    assert last_layout(twin).vision_counts["prune_1"] == [5, 5, 0]
    assert gradients_of_step(twin, inputs).keys() == gradients_of_step(model, inputs).keys()
    hidrop.restore(twin)
    assert hidrop.is_compiled(model)
    assert not hasattr(twin, "hidrop_ratios")


def test_a_pickled_model_comes_back_compiled_with_its_ratios() -> None:
    model = new(DTOPK)
    with torch.no_grad():
        model.hidrop_ratios.values += 1 / 9
    twin = pickle.loads(pickle.dumps(model))
    inputs = supervised_batch(model)
    torch.testing.assert_close(twin(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)
    assert last_layout(twin).vision_counts["prune_1"] == [5, 5, 0]


def test_restore_takes_the_ratios_out() -> None:
    model = new(DTOPK)
    hidrop.restore(model)
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in tiny_llava(num_layers=3).named_parameters()
    ]


def test_compiling_again_under_the_same_schedule_keeps_the_ratios(tmp_path: Path) -> None:
    model = new(DTOPK)
    values = model.hidrop_ratios.values
    values.data.copy_(torch.tensor([0.2, 0.6]))
    hidrop.save(model, tmp_path)
    hidrop.compile(model, DTOPK, backend="aot_eager")
    assert model.hidrop_ratios.values is values, "an optimizer holds this one"
    values.data.zero_()
    hidrop.load(model, tmp_path, backend="eager")
    assert model.hidrop_ratios.values is values
    assert torch.equal(values, torch.tensor([0.2, 0.6]))
    model(**supervised_batch(model))
    assert last_layout(model).vision_counts["prune_1"] == [8, 7, 0]


def test_compiling_again_under_another_schedule_drops_the_ratios_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = new(DTOPK)
    values = model.hidrop_ratios.values
    hidrop.compile(model, SOFT, backend="eager")
    assert "hidrop.save(model, directory) keeps them" in caplog.text
    assert model.hidrop_ratios.values is not values
    hidrop.compile(model, HARD, backend="eager")
    assert not hasattr(model, "hidrop_ratios")
