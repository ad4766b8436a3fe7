"""Weights that accelerate loads for each call of their module and drops behind it: on the CPU, or on disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from tests.support import counter
from tests.support.backbones import tiny_backbone
from tests.support.dispatched import ALL_ON_DISK, TAIL_ON_DISK, Map, device_map, dispatched
from tests.support.generation import new_tokens
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import IMAGE, PRUNED, batch, supervised, tiny_llava
from tests.support.ratios import DTOPK

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
NEW = 5
CPU = torch.device("cpu")
RESIDENT = device_map(["disk"] * 4, norm="disk", embedding="cpu", head="cpu")
"""Only the text decoder's layers and norm are offloaded."""


def on_meta(module: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


def offloaded(model: Any, how: str, directory: Path) -> Any:
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if how == "disk":
        return accelerate.disk_offload(model, str(directory), execution_device=CPU)
    if how == "buffers":
        return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)
    if how == "whole layers":
        kinds = ["LlamaDecoderLayer"]
        return accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=kinds)
    places: dict[str, Map] = {"tail": TAIL_ON_DISK, "all": ALL_ON_DISK}
    return dispatched(model, places[how], offload_dir=str(directory))


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return batch(tiny_llava(), ROWS)


@pytest.fixture(scope="module")
def expected(inputs: dict[str, Tensor]) -> tuple[list[list[int]], Tensor]:
    model = hidrop.compile(tiny_llava(), PRUNED, backend="eager")
    with torch.no_grad():
        return new_tokens(model, inputs, NEW), model(**inputs).logits


@pytest.mark.parametrize(
    ("how", "first"),
    [
        ("cpu", "compile"),
        ("tail", "offload"),
        *(
            pytest.param(how, first, marks=pytest.mark.slow)
            for how in ("whole layers", "buffers", "disk", "all")
            for first in ("compile", "offload")
        ),
    ],
)
def test_answers_are_those_of_the_whole_model(
    how: str, first: str, tmp_path: Path, inputs: dict[str, Tensor], expected: Any
) -> None:
    model = tiny_llava()
    if first == "offload":
        model = offloaded(model, how, tmp_path)
    model = hidrop.compile(model, PRUNED, backend="eager")
    if first == "compile":
        model = offloaded(model, how, tmp_path)
    layers = model.get_decoder().layers
    assert on_meta(layers[3])
    with counter.expect(captures=1, programs={"prefill": 2, "decode": 1}):
        for _ in range(2):
            assert new_tokens(model, inputs, NEW) == expected[0]
        with torch.no_grad():
            logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected[1], rtol=0, atol=0)
    assert on_meta(layers[3]), "loaded for the call alone"


@pytest.mark.slow
def test_restored_it_is_the_model_that_accelerate_made(
    tmp_path: Path, inputs: dict[str, Tensor]
) -> None:
    plain = tiny_llava()
    model = offloaded(tiny_llava(), "tail", tmp_path)
    forward = model.__dict__["forward"]
    hidrop.restore(hidrop.compile(model, PRUNED, backend="eager"))
    assert model.__dict__["forward"] is forward
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.slow
def test_a_failed_call_drops_what_it_loaded(tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    model = hidrop.compile(offloaded(tiny_llava(), "tail", tmp_path), PRUNED, backend="eager")
    new_tokens(model, inputs, 1)
    layer = model.get_decoder().layers[2]

    def fail(module: Any, *_: Any) -> None:
        assert not on_meta(layer.mlp.up_proj)
        raise RuntimeError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.mlp.down_proj.__dict__["_hf_hook"], "pre_forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            new_tokens(model, inputs, 1)
    assert on_meta(layer)
    assert new_tokens(model, inputs, 1)


def test_what_is_not_offloaded_trains_as_in_the_whole_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The projector and the learned ratios; offloaded weights get no gradient, and a warning says so."""
    whole = hidrop.compile(tiny_llava(), DTOPK, backend="eager").train()
    model = dispatched(tiny_llava(), RESIDENT, offload_dir=str(tmp_path))
    model = hidrop.compile(model, DTOPK, backend="eager").train()
    given = supervised(whole, ROWS, label_seed=3)
    loss, gradients = step(model, given)
    of_whole, all_gradients = step(whole, given)
    torch.testing.assert_close(loss, of_whole, rtol=0, atol=0)
    inside = {n for n, _ in model.named_parameters() if ".layers." in n and "language" in n}
    assert not inside & gradients.keys()
    assert {"hidrop_ratios.values", "model.multi_modal_projector.linear_1.weight"} <= {*gradients}
    assert_gradients_close(gradients, {name: all_gradients[name] for name in gradients})
    assert "get no gradient" in caplog.text


@pytest.mark.slow
def test_ratios_and_weights_are_saved_and_loaded(tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    model = dispatched(tiny_llava(), RESIDENT, offload_dir=str(tmp_path / "offload"))
    hidrop.compile(model, DTOPK, backend="eager")
    assert model.hidrop_ratios.values.device == CPU
    with torch.no_grad():
        model.hidrop_ratios.values.copy_(torch.tensor([0.4, 0.8]))
    tokens = new_tokens(model, inputs, NEW)
    model.save_pretrained(tmp_path / "saved")
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    loaded = hidrop.load(plain, tmp_path / "saved", backend="eager")
    assert torch.equal(loaded.hidrop_ratios.values, model.hidrop_ratios.values)
    assert new_tokens(loaded, inputs, NEW) == tokens
    again = dispatched(tiny_llava(), RESIDENT, offload_dir=str(tmp_path / "offload"))
    hidrop.load(again, tmp_path / "saved", backend="eager")
    assert new_tokens(again, inputs, NEW) == tokens


@pytest.mark.slow
def test_what_was_asked_for_and_is_left_off_is_said(
    tmp_path: Path, inputs: dict[str, Tensor], expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hidrop_fx")
    options: dict[str, Any] = {"cuda_graphs": True, "lowering": "whole", "overlap_vision": True}
    model = hidrop.compile(
        offloaded(tiny_llava(), "tail", tmp_path), PRUNED, backend="eager", **options
    )
    assert new_tokens(model, inputs, NEW) == expected[0]
    assert new_tokens(model, inputs, NEW) == expected[0]
    for words in ("without CUDA graphs", "called one by one", "not beside it"):
        (line,) = [r.getMessage() for r in caplog.records if words in r.getMessage()]
        assert "the text decoder runs on cpu, its weights loaded for each call" in line


@pytest.mark.slow
def test_other_weights_are_followed(tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    """The hook's own copy is what counts."""
    model, twin = tiny_llava(), tiny_llava()
    hidrop.compile(offloaded(model, "cpu", tmp_path), PRUNED, backend="eager")
    before = new_tokens(model, inputs, NEW)
    hook = model.get_decoder().layers[1].mlp.up_proj.__dict__["_hf_hook"]
    hook.weights_map["weight"].neg_()
    with torch.no_grad():
        twin.get_decoder().layers[1].mlp.up_proj.weight.neg_()
    hidrop.compile(twin, PRUNED, backend="eager")
    with counter.expect(captures=1):
        found = new_tokens(model, inputs, NEW)
        assert found == new_tokens(twin, inputs, NEW)
    assert found != before


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_bodies_are_shared_and_compiled_once(
    backend: str, tmp_path: Path, inputs: dict[str, Tensor], expected: Any
) -> None:
    model = hidrop.compile(offloaded(tiny_llava(), "all", tmp_path), PRUNED, backend=backend)
    assert new_tokens(model, inputs, NEW) == expected[0]
    with counter.expect(captures=0, programs=0, compiled=0):
        for _ in range(3):
            assert new_tokens(model, inputs, NEW) == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["gemma2", "qwen3_moe", "phi3", "granite"])
@pytest.mark.parametrize("schedule", ["inject=0", PRUNED])
def test_other_decoders(backbone: str, schedule: str, tmp_path: Path) -> None:
    whole = tiny_backbone(backbone)
    given = batch(whole, ROWS)
    hidrop.compile(whole, schedule, backend="eager")
    model = accelerate.cpu_offload(tiny_backbone(backbone), execution_device=CPU)
    hidrop.compile(model, schedule, backend="eager")
    assert new_tokens(model, given, NEW) == new_tokens(whole, given, NEW)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_other_modes_of_generate(
    options: dict[str, Any], tmp_path: Path, inputs: dict[str, Tensor]
) -> None:
    one = {k: v[:1] for k, v in inputs.items()}
    whole = hidrop.compile(tiny_llava(), PRUNED, backend="eager")
    model = hidrop.compile(offloaded(tiny_llava(), "all", tmp_path), PRUNED, backend="eager")
    assert new_tokens(model, one, NEW, **options) == new_tokens(whole, one, NEW, **options)


@pytest.mark.slow
def test_warm_up_and_compare(tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    model = hidrop.compile(offloaded(tiny_llava(), "all", tmp_path), PRUNED, backend="eager")
    hidrop.warmup(model, [hidrop.Shape(batch=2, text=8, images=1, new_tokens=2)])
    with counter.expect(captures=0):
        new_tokens(model, inputs, NEW)
    assert hidrop.compare(model, **inputs).first is None
