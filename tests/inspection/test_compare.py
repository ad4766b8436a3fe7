"""`compare` beyond prefill: decode layer by layer, a training step with every gradient, and its switches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx import passes
from hidrop_fx.ops.attention import cached_attention
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.models import IMAGE, batch, random_labels, tiny_llava

SCHEDULE = "inject=1,prune=2:4,exit=4"
LAYERS = 5
ROWS: Any = [[5, 6, IMAGE, 7], [8, 9, IMAGE, 4, IMAGE, 3, 3], [11, 12]]

pytestmark = pytest.mark.usefixtures("one_capture_a_model")


@pytest.fixture(scope="module")
def llavas() -> dict[Any, Any]:
    return {}


@pytest.fixture
def made(llavas: dict[Any, Any]) -> Any:
    """One model for each backbone, so that it is captured once."""

    def make(
        schedule: str = SCHEDULE, backbone: str = "llama", passes: Any = (), **options: Any
    ) -> Any:
        key = (backbone, *sorted(options.items()))
        if key not in llavas:
            llavas[key] = tiny_llava(backbone, num_layers=LAYERS, **options)
        model = llavas[key].eval()
        return hidrop.compile(model, schedule, backend="eager", passes=passes)

    return make


CASES = [
    ("llama", "identity", {}),
    ("llama", SCHEDULE, {"kv_heads": 2}),
    ("llama", "inject=1,prune=2:4,score=all_text_l2", {}),
    ("llama", "inject=2,prune=2:3+3:1,exit=4,positions=compact", {}),
    ("qwen2", "prune=1:0.5,exit=3,positions=group", {"sliding_window": 6}),
    ("mistral", "inject=1,prune=2:4", {"sliding_window": 5}),
]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("backbone", "schedule", "options"), CASES)
def test_compare_passes_a_right_decode(
    backbone: str, schedule: str, options: dict[str, Any], padding: Any, made: Any
) -> None:
    model = made(schedule, backbone, **options)
    inputs = batch(model, ROWS, padding=padding)
    found = hidrop.compare(model, new_tokens=4, **inputs)
    assert found.ok, str(found)
    assert [x.region for x in found.steps[-2:]] == ["decode output", "decode logits"]
    assert [x.layer for x in found.steps] == [*range(LAYERS), None, None]
    assert all(x.tokens == 4 * len(ROWS) for x in found.steps)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("backbone", "schedule", "options"), CASES)
def test_compare_passes_a_right_training_step(
    backbone: str, schedule: str, options: dict[str, Any], mode: str, made: Any
) -> None:
    model = made(schedule, backbone, **options)
    inputs = batch(model, ROWS)
    labels = random_labels(inputs)
    model.train(mode == "train")
    found = hidrop.compare(model, **inputs, labels=labels)
    assert found.ok, str(found)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    names = {gradient.name for gradient in found.gradients}
    # Of CLIP, the layers behind the features that LLaVA takes have no gradient.
    assert all("vision_tower" in name for name in trained - names)
    assert any("vision_tower" in name for name in names)
    assert all(p.grad is None for p in model.parameters())
    loss = model(**inputs, labels=labels).loss
    assert found.loss is not None
    # Both are fp32: as Python numbers they would be held to the rounding of doubles.
    torch.testing.assert_close(torch.tensor(found.loss.scale), loss.detach().abs())
    json.dumps(found.to_dict())


# What is broken is found.


def hotter_cached_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    *others, scale = rest
    return cached_attention(q, k, v, *others, scale * 1.5)


def faulty_kv_cache(
    program: Program, plan: Plan, *, original: Any = passes.kv_cache, **options: Any
) -> PassResult:
    result: PassResult = original(program, plan, **options)
    if program.kind == "decode":
        program.regions[3].attention.target = hotter_cached_attention
    return result


def test_compare_finds_a_broken_decode_pass_in_its_layer(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty_kv_cache.__name__ = "kv_cache"
    monkeypatch.setattr(passes, "kv_cache", faulty_kv_cache)
    model = made()
    inputs = batch(model, ROWS)
    assert hidrop.compare(model, **inputs).ok
    found = hidrop.compare(model, new_tokens=3, **inputs)
    assert found.first is not None
    assert found.first.layer == 3
    assert found.first.region == "decode layers.3"
    assert "decode layers.3 is the first to depart" in str(found)
    assert hidrop.compare(model, new_tokens=3, reference="program", **inputs).ok


class _Leaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 0.5


def leaky(states: Tensor) -> Tensor:
    return _Leaky.apply(states)  # type: ignore[no-any-return]


def halve_a_gradient(program: Program, plan: Plan) -> PassResult:
    """Right values, and half of the gradient that reaches v_proj of layer 3."""
    region = program.regions[3]
    value = region.attention.args[2]
    region.attention.replace_input_with(value, program.call(leaky, value, before=region.attention))
    return PassResult(matched=1)


def test_compare_names_a_wrong_gradient(made: Any) -> None:
    model = made(passes=[halve_a_gradient])
    model.train()
    inputs = batch(model, ROWS)
    labels = random_labels(inputs)
    found = hidrop.compare(model, reference="loop", **inputs, labels=labels)
    assert found.first is None
    assert not found.ok
    assert found.loss is not None
    assert not found.loss.departs
    worst = found.worst_gradient
    assert worst is not None
    assert worst.departs
    assert worst.relative == max(g.relative for g in found.gradients)
    assert f"the gradient of {worst.name} departs most" in str(found)
    nearest = found.nearest_gradient
    assert nearest is not None
    assert nearest.name.startswith("model.language_model.layers.3.")
    assert f"nearest to the loss is that of {nearest.name}" in str(found)
    layer = "model.language_model.layers.3."
    wrong = {g.name.removeprefix(layer) for g in found.gradients if g.departs}
    assert {"self_attn.v_proj.weight", "input_layernorm.weight"} <= wrong
    assert not wrong & {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight"}
    behind = [g for g in found.gradients if "layers.4" in g.name or "lm_head" in g.name]
    assert not any(g.departs for g in behind)
    without = hidrop.compare(
        model, reference="loop", disable=("halve_a_gradient",), **inputs, labels=labels
    )
    assert without.ok, str(without)


def twice(states: Tensor) -> Tensor:
    return states * 2


def double_layer_two(program: Program, plan: Plan) -> PassResult:
    region = program.regions[2]
    user = next(iter(region.attention.users))
    user.replace_input_with(region.attention, program.call(twice, region.attention, before=user))
    return PassResult(matched=1)


def test_compare_accepts_the_change_of_a_custom_pass_unless_asked(made: Any) -> None:
    model = made(passes=[double_layer_two])
    inputs = batch(model, ROWS)
    found = hidrop.compare(model, new_tokens=2, **inputs)
    assert found.reference == "program"
    assert found.ok, str(found)
    against = hidrop.compare(model, new_tokens=2, reference="loop", **inputs)
    assert against.first is not None
    assert against.first.region == "layers.2"
    without = hidrop.compare(model, new_tokens=2, disable=("double_layer_two",), **inputs)
    assert without.reference == "loop"
    assert without.ok, str(without)


# Switches.


@pytest.mark.parametrize(
    "switches",
    [
        {"cuda_graphs": True},
        {"overlap_vision": True},
        {"cuda_graphs": True, "overlap_vision": True},
        {"attention": "sdpa"},
        {"lowering": "whole"},
        {"disable": ("attention", "head")},
        {"cuda_graphs": True, "disable": ("head",)},
        {"reference": "program"},
    ],
)
def test_compare_with_switches_passes_a_right_program(switches: dict[str, Any], made: Any) -> None:
    model = made()
    before = runtime_of(model)
    inputs = batch(model, ROWS)
    found = hidrop.compare(model, new_tokens=3, **switches, **inputs)
    assert found.ok, str(found)
    assert runtime_of(model) is before


def test_compare_with_cuda_graphs_replays_graphs(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hidrop_fx.runtime.cuda_graphs import entry as graphs

    replayed = []
    original = graphs.GraphEntry.__call__

    def counted(self: Any, inputs: Any) -> Any:
        replayed.append(self.kind)
        return original(self, inputs)

    monkeypatch.setattr(graphs.GraphEntry, "__call__", counted)
    model = made()
    assert hidrop.compare(model, new_tokens=3, cuda_graphs=True, **batch(model, ROWS)).ok
    assert replayed == ["prefill graph", *["decode graph"] * 3]


def test_compare_holds_learned_ratios_against_the_program(made: Any) -> None:
    model = made("inject=1,prune=2:4,exit=4,selection=dtopk")
    model.train()
    inputs = batch(model, ROWS)
    labels = random_labels(inputs)
    found = hidrop.compare(model, lowering="whole", **inputs, labels=labels)
    assert found.reference == "program"
    assert found.ok, str(found)
    assert any("hidrop_ratios" in gradient.name for gradient in found.gradients)
    with pytest.raises(hidrop.HidropError, match="knows nothing of the ratios"):
        hidrop.compare(model, reference="loop", **inputs, labels=labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "eager"}, "attention='eager'; use one of sdpa"),
        ({"new_tokens": -1}, "new_tokens=-1"),
        ({"disable": ("prune",)}, "passes of your own: none"),
    ],
)
def test_compare_refuses_bad_input(options: dict[str, Any], message: str, made: Any) -> None:
    model = made()
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.compare(model, **options, **batch(model, ROWS))


def test_compare_refuses_bad_training_input(made: Any) -> None:
    model = made()
    inputs = batch(model, ROWS)
    labels = random_labels(inputs)
    with pytest.raises(hidrop.HidropError, match="new_tokens=2 came with labels"):
        hidrop.compare(model, new_tokens=2, **inputs, labels=labels)
    model.requires_grad_(False)
    try:
        with pytest.raises(hidrop.HidropError, match="no parameter of the model requires"):
            hidrop.compare(model, **inputs, labels=labels)
    finally:
        model.requires_grad_(True)


def test_compare_refuses_random_scores(made: Any) -> None:
    model = made("prune=1:4,score=random")
    with pytest.raises(hidrop.HidropError, match="draws other tokens in every run"):
        hidrop.compare(model, **batch(model, ROWS))


# replay


@pytest.mark.parametrize("schedule", [SCHEDULE, "inject=2,prune=2:3+3:1,positions=compact"])
def test_replay_of_a_train_program_checks_its_gradients(
    schedule: str, made: Any, tmp_path: Path
) -> None:
    model = made(schedule)
    model.train()
    inputs = batch(model, ROWS)
    labels = random_labels(inputs)
    model(**inputs, labels=labels)
    found = hidrop.replay(hidrop.dump(model, tmp_path), model, **inputs, labels=labels)
    assert found.ok, str(found)
    for stage in found.stages:
        assert stage.loss is not None
        assert any("layers.0" in gradient.name for gradient in stage.gradients)
    json.dumps(found.to_dict())


def test_replay_finds_a_stage_with_a_wrong_gradient(made: Any, tmp_path: Path) -> None:
    model = made(passes=[halve_a_gradient])
    model.train()
    inputs = batch(model, ROWS)
    labels = random_labels(inputs)
    model(**inputs, labels=labels)
    found = hidrop.replay(hidrop.dump(model, tmp_path), model, **inputs, labels=labels)
    assert found.first is not None
    assert found.first.name == "halve_a_gradient", str(found)
    assert found.first.departing is not None
    assert ".layers.3." in found.first.departing.name
    assert "halve_a_gradient is at fault: the gradient of " in str(found)
