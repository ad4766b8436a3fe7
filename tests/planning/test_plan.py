"""Costs of plans against arithmetic by hand and the published numbers.

Over 400 lines: most are figures and their derivations.
"""

import ast
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)

import hidrop_fx.planning.costs
from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.planning import DEFAULT_TEXT_TOKENS, Costs, Run, plan
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.schedule.schedule import Schedule

LLAVA_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vision_tokens": 576,
}
TINY: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 50,
    "vision_tokens": 10,
    "text_tokens": 4,
}


def llava_config(vision: Any = None, **kwargs: Any) -> LlavaConfig:
    if vision is None:
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        )
    text = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, **kwargs)


# --- the published numbers ---


@pytest.mark.parametrize(
    ("name", "token_layers", "tflops"),
    [
        ("identity", 32 * 576, 3.817),
        ("hidrop-80", 2561, 0.529),  # 80.03 a layer, published as 80.0
        ("hidrop-64", 64 * 32, 0.421),
        ("hidrop-48", 48 * 32, 0.317),
    ],
)
def test_presets_have_the_published_token_layers_and_tflops(
    name: str, token_layers: int, tflops: float
) -> None:
    p = plan(name, **LLAVA_7B)
    assert p.average_vision_tokens == token_layers / 32
    assert sum(p.vision_tokens) == token_layers
    assert round(p.vision_flops / 1e12, 3) == tflops
    budget = int(name[-2:]) if name != "identity" else 576
    assert round(p.average_vision_tokens, 1) == budget


def test_hidrop_64_has_the_published_tokens_layer_by_layer() -> None:
    p = plan(Schedule.preset("hidrop-64"), **LLAVA_7B, text_tokens=64)
    assert p.segments == (
        Run(0, 8, 0, "text"),
        Run(8, 10, 576, "inject"),
        Run(10, 14, 215, "prune"),
        Run(14, 16, 10, "prune"),
        Run(16, 18, 5, "prune"),
        Run(18, 24, 1, "prune"),
        Run(24, 32, 0, "exit"),
    )
    vision = [0] * 8 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8
    assert p.vision_tokens == tuple(vision)
    assert p.tokens == tuple(64 + n for n in vision)
    assert p.token_layer_ratio == 32 * 640 / (32 * 64 + 2048) == 5.0


# --- costs, by hand ---


def test_costs_equal_arithmetic_by_hand() -> None:
    p = plan(
        "inject=1,prune=2:5+4:2,exit=5", **TINY, dtype_bytes=4, batch_size=3, new_tokens=7
    )  # text 4, vision 10
    assert p.tokens == (4, 14, 9, 9, 6, 4)

    # hidden 8, queries 4 * 3 = 12 wide, keys 2 * 3 = 6 wide, MLP 20; sum of tokens 46
    q_and_o = 2 * 46 * 8 * 12
    k_and_v = 2 * 46 * 8 * 6
    mlp = 3 * 46 * 8 * 20
    pairs = 4 * 5 // 2 + 14 * 15 // 2 + 9 * 10 // 2 + 9 * 10 // 2 + 6 * 7 // 2 + 4 * 5 // 2
    attention = 2 * 12 * pairs
    # layer 2 scores 14 and drops 5, layer 4 scores 9 and drops 3
    scoring = (5 * 8 * 6 + 14 * 12) + (3 * 8 * 6 + 9 * 12)
    head = 8 * 50
    assert p.flops == 2 * (q_and_o + k_and_v + mlp + attention + scoring + head)

    cached = (4 + 7) + (14 + 7) + (9 + 7) + (9 + 7) + (6 + 7) + (4 + 7)
    assert p.kv_bytes == 2 * 2 * 3 * cached * 4 * 3

    # vision tokens alone: 0, 10, 5, 5, 2, 0
    square = 4 * (10 + 5 + 5 + 2) * 8 * 8
    quadratic = 2 * (10**2 + 5**2 + 5**2 + 2**2) * 8
    assert p.vision_flops == square + quadratic + 3 * (10 + 5 + 5 + 2) * 8 * 20
    assert p.token_layer_ratio == 6 * 14 / 46


def test_prune_at_inject_scores_all_that_come_in() -> None:
    assert plan("inject=2,prune=2:3", **TINY).segments == (
        Run(0, 2, 0, "text"),
        Run(2, 6, 3, "prune"),
    )
    pruned, late = plan("prune=0:3", **TINY), plan(Schedule(), **TINY | {"vision_tokens": 3})
    assert pruned.segments == (Run(0, 6, 3, "prune"),)
    assert pruned.flops - late.flops == 2 * (7 * 8 * 6 + 14 * 12)


@pytest.mark.parametrize(
    ("schedule", "segments"),
    [
        (Schedule(), [(0, 6, 10, "start")]),
        (Schedule(exit=6), [(0, 6, 10, "start")]),
        (Schedule(exit=1), [(0, 1, 10, "start"), (1, 6, 0, "exit")]),
        (Schedule(inject=5), [(0, 5, 0, "text"), (5, 6, 10, "inject")]),
        (Schedule(prune={3: 99}), [(0, 3, 10, "start"), (3, 6, 10, "prune")]),
    ],
)
def test_segments_follow_the_events_of_the_schedule(
    schedule: Schedule, segments: list[tuple[int, int, int, str]]
) -> None:
    p = plan(schedule, **TINY)
    assert p.segments == tuple(Run(*s) for s in segments)
    assert len(p.tokens) == 6


def test_identity_of_a_plan_is_the_plan_of_the_identity_schedule() -> None:
    p = plan("inject=2,exit=3", **TINY, new_tokens=5, batch_size=2)
    whole = p.identity
    assert whole == plan(Schedule(), **TINY, new_tokens=5, batch_size=2)
    assert whole.identity == whole
    assert whole.token_layer_ratio == 1.0
    assert whole.tokens == (14,) * 6
    assert pickle.loads(pickle.dumps(p)) == p
    assert len({p, plan("exit=3,inject=2", **TINY, new_tokens=5, batch_size=2)}) == 1


@given(st.integers(0, 300), st.integers(1, 3), st.integers(1, 50))
def test_a_schedule_never_adds_tokens(vision_tokens: int, images: int, text_tokens: int) -> None:
    sizes = TINY | {
        "vision_tokens": vision_tokens,
        "text_tokens": text_tokens,
        "images": images,
    }
    p = plan(Schedule(inject=1, prune={2: 0.5, 3: 40, 4: 0.1}, exit=5), **sizes)
    assert [s.stop for s in p.segments] == [s.start for s in p.segments[1:]] + [6]
    assert all(a <= b for a, b in zip(p.tokens, p.identity.tokens, strict=True))
    assert p.kv_bytes <= p.identity.kv_bytes
    assert p.token_layer_ratio >= 1


def test_mixed_keeps_that_grow_are_clamped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    p = plan("prune=1:2+3:0.5", **TINY)
    assert p.vision_tokens == (10, 2, 2, 2, 2, 2)
    assert "prune layer 3 keeps 0.5, 5 of 10 vision tokens, but only 2 are left" in caplog.text
    caplog.clear()
    plan("prune=1:99+3:99+4:0.5", **TINY)
    assert not caplog.records


def test_int_keeps_count_per_image() -> None:
    p = plan("prune=1:2", **TINY | {"vision_tokens": 30}, images=3)
    assert p.vision_tokens == (30, 6, 6, 6, 6, 6)


# --- out ---


def test_plan_to_dict_is_json() -> None:
    p = plan("hidrop-48", **LLAVA_7B)
    d = json.loads(json.dumps(p.to_dict()))
    assert d["schedule"] == json.loads(p.schedule.to_json())
    assert d["geometry"]["hidden_size"] == 4096
    assert d["segments"][1] == {"start": 8, "stop": 10, "vision_tokens": 576, "reason": "inject"}
    assert d["tokens"] == list(p.tokens)
    assert d["flops"] == p.flops
    assert d["identity"]["kv_bytes"] == p.identity.kv_bytes
    assert d["token_layer_ratio"] == p.token_layer_ratio


def test_plan_str_is_a_table() -> None:
    lines = str(plan("hidrop-64", **LLAVA_7B)).splitlines()
    assert lines[0] == "schedule  inject=8,prune=10:215+14:10+16:5+18:1,exit=24"
    assert "64 text + 576 vision tokens, 1 image;" in lines[2]
    rows = [line.split() for line in lines]
    assert ["10-13", "prune", "215", "279"] in rows
    assert ["vision", "TFLOPs", "(papers')", "0.421", "3.817", "9.06x"] in rows
    assert "-" in str(plan("identity", **LLAVA_7B | {"vision_tokens": 0})).splitlines()[8]


# --- from a model ---


def test_plan_takes_sizes_from_a_model() -> None:
    model = LlavaForConditionalGeneration(llava_config()).bfloat16()
    p = plan("inject=2,prune=3:5,exit=6", model, images=2)
    assert p.geometry == Geometry.from_model(model)
    assert p.geometry == Geometry(
        num_layers=8,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=99,
        dtype_bytes=2,
    )
    assert p.text_tokens == DEFAULT_TEXT_TOKENS
    pixels = torch.zeros(2, 3, 28, 28, dtype=torch.bfloat16)
    features = model.get_image_features(pixels).pooler_output
    assert p.total_vision_tokens == sum(len(f) for f in features) == 32
    assert p.vision_tokens == (0, 0, 32, 10, 10, 10, 0, 0)
    assert Geometry.from_model(model.float()).dtype_bytes == 4


def test_plan_keywords_override_the_model() -> None:
    p = plan("identity", llava_config(), num_layers=3, vision_tokens=7, dtype_bytes=8, vocab_size=0)
    assert p.tokens == (DEFAULT_TEXT_TOKENS + 7,) * 3
    assert (p.geometry.dtype_bytes, p.geometry.vocab_size) == (8, 0)


def test_text_presets_scale_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    assert plan("hidrop-64", llava_config()).schedule == Schedule.preset("hidrop-64", 8)


@pytest.mark.parametrize(
    ("vision", "strategy", "tokens"),
    [
        (CLIPVisionConfig(image_size=336, patch_size=14), "default", 576),
        (CLIPVisionConfig(image_size=336, patch_size=14), "full", 577),
        (CLIPVisionConfig(image_size=224, patch_size=32), "default", 49),
        (SiglipVisionConfig(image_size=384, patch_size=14), "full", 729),
        (SiglipVisionConfig(image_size=384, patch_size=14), "default", 728),
    ],
)
def test_vision_tokens_of_known_towers(vision: Any, strategy: str, tokens: int) -> None:
    config = llava_config(vision, vision_feature_select_strategy=strategy)
    assert plan("identity", config).total_vision_tokens == tokens
    assert plan("identity", config, images=3).total_vision_tokens == 3 * tokens
    assert plan("identity", config, images=0).total_vision_tokens == 0


@pytest.mark.parametrize(
    ("vision", "strategy", "tokens"),
    [
        (Dinov2Config(image_size=224, patch_size=14), "default", 256),
        (Dinov2WithRegistersConfig(image_size=224, patch_size=14), "full", 256 + 5),
        (DeiTConfig(image_size=32, patch_size=8), "default", 17),
        (ViTConfig(image_size=32, patch_size=8), "full", 17),
    ],
)
def test_vision_tokens_of_towers_with_tokens_of_their_own(
    vision: Any, strategy: str, tokens: int
) -> None:
    config = llava_config(vision, vision_feature_select_strategy=strategy)
    assert plan("identity", config).total_vision_tokens == tokens


def test_images_of_any_size_count_as_the_largest(caplog: pytest.LogCaptureFixture) -> None:
    config = llava_config(
        PixtralVisionConfig(image_size=64, patch_size=8), vision_feature_select_strategy="full"
    )
    with caplog.at_level("INFO", logger="hidrop_fx"):
        assert plan("identity", config, images=2).total_vision_tokens == 2 * 64
    assert "images of this model vary in their number of tokens" in caplog.text
    caplog.clear()
    assert plan("identity", config, vision_tokens=5).total_vision_tokens == 5
    assert caplog.text == ""


def duck(vision_type: str = "other", text: dict[str, Any] | None = None, **config: Any) -> Any:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 12,
        "intermediate_size": 5,
        "num_attention_heads": 3,
    }
    text_config = SimpleNamespace(**(sizes | {"vocab_size": 9} if text is None else text))
    return SimpleNamespace(
        config=SimpleNamespace(
            get_text_config=lambda: text_config,
            vision_config=SimpleNamespace(model_type=vision_type, image_size=8, patch_size=2),
            **config,
        )
    )


def test_plan_reads_a_sparse_config() -> None:
    g = Geometry.from_model(duck())
    assert (g.num_key_value_heads, g.head_dim, g.dtype_bytes) == (3, 4, 2)
    assert plan("identity", duck(image_seq_length=11)).total_vision_tokens == 11


@pytest.mark.parametrize(
    "model",
    [
        duck(),
        duck(image_seq_length=576, image_grid_pinpoints=[[336, 672]]),
    ],
)
def test_a_model_of_unknown_vision_tokens_asks_for_the_keyword(model: Any) -> None:
    with pytest.raises(
        ScheduleError,
        match=r"missing vision_tokens \(SimpleNamespace does not tell\): pass vision_tokens=\.\.\.$",
    ):
        plan("identity", model)
    assert plan("identity", model, vision_tokens=5).total_vision_tokens == 5


def test_plan_refuses_unsupported_models() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no config with get_text_config"):
        Geometry.from_model(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError, match=r"does not tell num_layers, .*: give them to"):
        Geometry.from_model(duck(text={"hidden_size": 4}))


# --- without a model ---


def test_plan_without_a_model_takes_common_defaults() -> None:
    assert plan("identity", **LLAVA_7B).geometry == Geometry(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=0,
        dtype_bytes=2,
    )
    odd = plan("identity", **LLAVA_7B | {"hidden_size": 100}).geometry
    assert (odd.num_attention_heads, odd.head_dim) == (1, 100)
    by_width = plan("identity", **LLAVA_7B, head_dim=64).geometry
    assert (by_width.num_attention_heads, by_width.num_key_value_heads) == (64, 64)


def test_plan_names_the_missing_sizes() -> None:
    with pytest.raises(
        ScheduleError,
        match=r"missing num_layers, hidden_size, intermediate_size, vision_tokens \(no model is "
        r"given\): pass num_layers=\.\.\., .* or a model",
    ):
        plan("identity")
    with pytest.raises(ScheduleError, match=r"missing hidden_size \("):
        plan("identity", num_layers=1, intermediate_size=1, vision_tokens=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 is too small: use an integer >= 1"),
        ({"num_layers": True}, "num_layers=True is a bool"),
        ({"hidden_size": 8.0}, r"hidden_size=8.0 is a float"),
        ({"intermediate_size": -1}, "intermediate_size=-1 is too small"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is too small"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads"),
        ({"head_dim": 0}, "head_dim=0 is too small"),
        ({"head_dim": 0, "num_attention_heads": None}, "head_dim=0 is too small"),
        ({"head_dim": None, "num_attention_heads": 3}, "hidden_size=8 is no multiple of .*head_d"),
        ({"vocab_size": -1}, "vocab_size=-1 is too small: use an integer >= 0"),
        ({"dtype_bytes": 0}, "dtype_bytes=0 is too small"),
        ({"vision_tokens": -1}, "vision_tokens=-1 is too small: use an integer >= 0"),
        ({"text_tokens": 0}, "text_tokens=0 is too small: use an integer >= 1"),
        ({"images": "1"}, "images='1' is a str"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"new_tokens": -1}, "new_tokens=-1 is too small"),
        ({"schedule": 8}, "schedule=8 is a int: use a Schedule or its text form"),
        ({"schedule": Schedule(exit=7)}, "exit=7 but the model has 6 layers"),
        ({"schedule": "exit=7"}, "exit=7 but the model has 6 layers"),
        ({"schedule": "prune=1:3", "images": 0}, "vision_tokens=10 but images=0"),
    ],
)
def test_plan_refuses_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        plan(**{"schedule": "identity", **TINY, **changes})


def test_plan_of_a_sample_without_images_has_no_vision_tokens() -> None:
    p = plan("inject=1,prune=2:5,exit=4", **TINY | {"vision_tokens": 0}, images=0)
    assert p.tokens == (4,) * 6
    assert p.vision_flops == 0
    assert p.token_layer_ratio == 1.0
    assert isinstance(p, Costs)


def test_planning_imports_neither_torch_nor_transformers() -> None:
    for module in (
        *("events", "event_kinds", "plan", "costs", "learned_keeps", "geometry", "from_model"),
        *("roofline", "launch_counts"),
    ):
        source = Path(hidrop_fx.planning.costs.__file__).with_name(f"{module}.py").read_text()
        imported = {
            alias.name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not {name.split(".")[0] for name in imported} & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"num_local_experts": 4}, "experts"),
        ({"kv_lora_rank": 16}, "latent keys and values"),
        ({"n_routed_experts": 2, "kv_lora_rank": 16}, "experts and latent keys and values"),
    ],
)
def test_experts_and_latent_keys_are_said_to_count_as_dense(
    sizes: dict[str, int], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = LlamaConfig(num_hidden_layers=4, hidden_size=64, intermediate_size=128, **sizes)
    plan("inject=1", config, vision_tokens=8)
    assert f"LlamaConfig has {part}: FLOPs" in caplog.text
    caplog.clear()
    plan("inject=1", LlamaConfig(num_hidden_layers=4, hidden_size=64), vision_tokens=8)
    assert "FLOPs" not in caplog.text
