"""Costs of decoders with recurrences: weights and caches as the models have them, FLOPs by hand."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from hidrop_fx.analysis.data.typical_sample import TypicalSample
from hidrop_fx.planning.geometry import Geometry
from tests.support.backbones import LAYERS, text_config, tiny_backbone
from tests.support.models import IMAGE, batch
from tests.support.runtimes import compiled_eagerly

NAMES = (
    "qwen3_5_text",
    "qwen3_next",
    "olmo_hybrid",
    "bamba",
    "granitemoehybrid_dense",
    "falcon_h1",
    "nemotron_h_between",
    "jamba",
)
SCHEDULE = Schedule(inject=1, exit=3)


def planned(model: Any, schedule: Schedule = SCHEDULE, **sizes: Any) -> Any:
    return hidrop.plan(schedule, model, **{"vision_tokens": 9, "text_tokens": 5, **sizes})


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_layers(name: str) -> None:
    """Projections and convolutions, each number of which a token meets once; layers with experts aside."""
    model = tiny_backbone(name)
    costs, dense = planned(model, dtype_bytes=1), 0
    for found, layer in zip(costs.layer_weight_bytes, model.get_decoder().layers, strict=True):
        if any("expert" in path for path, _ in layer.named_modules()):
            continue
        kinds = (nn.Linear, nn.Conv1d)
        assert found == sum(m.weight.numel() for m in layer.modules() if isinstance(m, kinds))
        dense += 1
    assert dense or name == "qwen3_next"


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "nemotron_h_between", "jamba"])
def test_caches_are_as_large_as_those_of_a_run(name: str) -> None:
    model = tiny_backbone(name)
    inputs = batch(model, [[5, 6, IMAGE, 7, 8, 9]])
    with compiled_eagerly(model, SCHEDULE):
        cache = model(**inputs).past_key_values
        report = hidrop.inspect(model)
    found = sum(
        layer.keys[:, :, : layer.filled].nbytes + layer.values[:, :, : layer.filled].nbytes
        if type(layer).__name__ == "HidropLayer"
        else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
        if layer.keys is not None
    )
    costs = planned(model)
    assert costs.kv_bytes == found
    assert sum(layer.kv_bytes for layer in report.layers) == found


def test_a_delta_rule_by_hand() -> None:
    """Layers 0 and 3 have it: 2 key heads of 8, 4 value heads of 6, a kernel of 3; layers 1 and 2 attend."""
    costs = planned(text_config("qwen3_5_text"), Schedule(inject=1, exit=3))
    assert costs.tokens == (5, 14, 14, 5)
    queries_keys_values = 16 + 16 + 24
    projections = 32 * (queries_keys_values + 24 + 4 + 4) + 24 * 32
    recurrence = 4 * (4 * 8 * 6)
    mlp = 3 * 32 * 48
    delta = projections + 3 * queries_keys_values + recurrence + mlp
    heads, keys = 4 * 16, 2 * 16
    attention = 32 * (2 * heads + heads + 2 * keys)  # queries with their gate, output, keys, values
    attending = 14 * (attention + mlp) + 14 * 15 * heads
    assert costs.layer_flops == (2 * 5 * delta, 2 * attending, 2 * attending, 2 * 5 * delta)
    state, inputs = 4 * 8 * 6, 3 * queries_keys_values
    assert costs.cached_tokens == (0, 14, 14, 0)
    assert costs.layer_kv_bytes[0] == 4 * state + 2 * inputs
    assert costs.layer_kv_bytes[1] == 14 * 2 * keys * 2
    longer = planned(text_config("qwen3_5_text"), new_tokens=10, batch_size=3)
    assert longer.layer_kv_bytes[0] == 3 * costs.layer_kv_bytes[0]
    assert longer.layer_kv_bytes[1] == 3 * 24 * 2 * keys * 2
    step = costs.decode_work
    assert step[0].flops == 2 * delta
    assert step[0].bytes == costs.layer_weight_bytes[0] + costs.layer_kv_bytes[0]
    assert step[1].flops == 2 * 2 * (attention + mlp + 2 * 15 * heads)


def test_layers_of_an_mlp_alone_and_of_both_kinds_by_hand() -> None:
    """Nemotron-H: MLP of two matrices, attention, MLP, Mamba-2. Falcon-H1: attention and Mamba-2 in each layer."""
    width, written = 4 * 16, 2 * 6
    space = 32 * (2 * width + 2 * written + 4) + width * 32 + 3 * (width + 2 * written)
    scan = 3 * width * 6
    nemotron = planned(text_config("nemotron_h_between"), Schedule())
    heads, keys = 4 * 16, 2 * 16
    attention = 14 * 2 * 32 * (heads + keys) + 14 * 15 * heads
    mlp = 14 * 2 * 32 * 48
    assert nemotron.layer_flops == (2 * mlp, 2 * attention, 2 * mlp, 2 * 14 * (space + scan))
    assert nemotron.layer_kv_bytes[0] == 0
    falcon = planned(text_config("falcon_h1"), Schedule())
    heads, keys = 4 * 8, 2 * 8
    attention = 14 * 2 * 32 * (heads + keys) + 14 * 15 * heads
    both = attention + 14 * (space + scan + 3 * 32 * 48)
    assert falcon.layer_flops == (2 * both,) * LAYERS
    assert falcon.layer_kv_bytes[0] == 14 * 2 * keys * 2 + 4 * width * 6 + 2 * 3 * (
        width + 2 * written
    )


def test_no_warning_of_what_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hidrop_fx"):
        for name in ("qwen3_5_text", "bamba", "falcon_h1"):
            planned(text_config(name))
        assert not caplog.records
        planned(text_config("jamba"))
    assert "has experts: FLOPs" in caplog.text


def test_a_calibration_that_was_read_back_counts_them_too() -> None:
    costs = planned(text_config("falcon_h1"))
    written = json.loads(json.dumps(asdict(costs.geometry)))
    geometry = Geometry(**written)
    assert geometry == costs.geometry
    typical = TypicalSample(geometry=geometry, text_tokens=5, tokens_per_image=9, images=1)
    assert typical.plan(SCHEDULE).layer_flops == costs.layer_flops
    assert json.loads(json.dumps(costs.to_dict()))["geometry"] == written
