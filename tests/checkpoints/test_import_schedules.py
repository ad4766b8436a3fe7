"""The schedule of a checkpoint's config.json is written beside it, and the model runs under it.

What the keys mean: published code of HiDrop (`modeling_llama_exit_topk.py`), PyramidDrop and TwigVLM, as in methods-verified, part A for
the latter; a prune *behind* a 1-based layer is one at a 0-based layer's input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.checkpoints.original_config import read_config
from hidrop_fx.checkpoints.original_schedule import schedule_of
from tests.support.models import IMAGE, IMAGE_TOKEN, VOCAB, batch, tiny_llava
from tests.support.original_llava import Original, write_file

HIDROP = {"late_entry_layer": 9, "early_exit_layer": 25}
LISTS = {"layer_list": "[10,14,16,18]", "image_token_keep_list": "[215,10,5,1]"}
PDROP = {"layer_list": [8, 16, 24], "image_token_ratio_list": [0.5, 0.25, 0.125]}
CASES: dict[str, tuple[dict[str, Any], hidrop.Schedule | str | None]] = {
    "hidrop-64": ({**HIDROP, **LISTS}, "hidrop-64"),
    "hidrop-48, with all of an image before": (
        {**HIDROP, "layer_list": [10, 14, 16, 18], "image_token_keep_list": [576, 87, 10, 5, 1]},
        "hidrop-48",
    ),
    "hidrop-80, all as text": (
        {
            **{"late_entry_layer": "9", "early_exit_layer": "25", "layer_list": "[10, 13, 16, 19]"},
            "image_token_keep_list": " [453,10,5,1]",
        },
        "hidrop-80",
    ),
    "compacted": (
        {"model_type": "llava_llama_exit_topk_cdp", **HIDROP, **LISTS},
        hidrop.Schedule(
            inject=8, prune={10: 215, 14: 10, 16: 5, 18: 1}, exit=24, positions="compact"
        ),
    ),
    "grouped": (
        {"model_type": "llava_llama_exit_sep_topk", **HIDROP, **LISTS},
        hidrop.Schedule(
            inject=8, prune={10: 215, 14: 10, 16: 5, 18: 1}, exit=24, positions="group"
        ),
    ),
    "entry and exit alone": (
        {"model_type": "llava_llama_exit", **HIDROP},
        hidrop.Schedule(inject=8, exit=24),
    ),
    "never exits": (
        {"late_entry_layer": 1, "early_exit_layer": 33, **LISTS},
        hidrop.Schedule(prune={10: 215, 14: 10, 16: 5, 18: 1}, exit=32),
    ),
    "topk": (
        {"model_type": "llava_llama_topk", **LISTS},
        hidrop.Schedule(prune={10: 215, 14: 10, 16: 5, 18: 1}, positions="compact"),
    ),
    "pyramiddrop": (PDROP, "pyramiddrop"),
    "a ratio of one": (
        {"layer_list": [8], "image_token_ratio_list": [1]},
        hidrop.Schedule(prune={8: 1.0}, positions="compact", rounding="floor"),
    ),
    "pyramiddrop, with 1.0 before": (
        {**PDROP, "image_token_ratio_list": "[1.0, 0.5, 0.25, 0.125]"},
        "pyramiddrop",
    ),
    "twigvlm": ({"twig_K": 2, "twig_T": 3, "avg_retain_rank": 192}, "twigvlm(average=192)"),
    "twigvlm, other layers": (
        {"twig_K": 3, "avg_retain_rank": 64, "wipe_layer": [3, 20]},
        "twigvlm(layer=3,average=64,exit=20)",
    ),
    "none": ({"layer_list": None}, None),
}


def of_32_layers(folder: Path, **values: Any) -> Any:
    """Read a config.json of LLaVA-1.5-7B's depth with some keys."""
    plain = {"model_type": "llava_llama", "mm_vision_tower": "clip", "num_hidden_layers": 32}
    (folder / "config.json").write_text(json.dumps({**plain, **values}))
    return read_config(folder)


@pytest.mark.parametrize("name", CASES)
def test_keys_of_the_authors_mean(name: str, tmp_path: Path) -> None:
    values, expected = CASES[name]
    if isinstance(expected, str):
        expected = hidrop.Schedule.parse(expected, 32)
    assert schedule_of(of_32_layers(tmp_path, **values), 576) == expected


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no keeps": ({"layer_list": [2]}, r"has layer_list, and no image_token_keep_list or"),
    "no layers": ({"image_token_ratio_list": [0.5]}, r"and no layer_list"),
    "both": ({**LISTS, **PDROP}, r"both image_token_keep_list and image_token_ratio_list"),
    "more keeps": (
        {"layer_list": [2], "image_token_keep_list": [9, 5]},
        r"layer_list=\[2\] and image_token_keep_list=\[9, 5\]: one keep",
    ),
    "twice": ({"layer_list": [2, 2], "image_token_keep_list": [9, 5]}, r"each layer comes once"),
    "zeroth": ({"layer_list": [0], "image_token_keep_list": [9]}, r"layers are ints from 1 on"),
    "no int": ({"late_entry_layer": 2.5}, r"late_entry_layer=2\.5: layers are ints"),
    "half a token": (
        {"layer_list": [2], "image_token_keep_list": [6.5]},
        r"image_token_keep_list=\[6\.5\]: numbers of tokens are ints",
    ),
    "too deep": (
        {"layer_list": [32], "image_token_keep_list": [9]},
        r"layer_list=\[32\].* make no schedule: prune layer 32",
    ),
    "script's default": ({"late_entry_layer": 99}, r"late_entry_layer=99 make no schedule"),
    "out of order": (
        {"late_entry_layer": 9, "layer_list": [3], "image_token_keep_list": [9]},
        r"late_entry_layer=9, layer_list=\[3\]",
    ),
    "growing": ({"layer_list": [2, 3], "image_token_keep_list": [5, 9]}, r"make no schedule"),
    "code": ({"layer_list": "__import__('os')"}, r"layer_list=\"__import__\('os'\)\" cannot be"),
    "words": ({"layer_list": ["a"], "image_token_keep_list": [1]}, r"is no list of numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_make_no_schedule_are_named(name: str, tmp_path: Path) -> None:
    values, message = WRONG[name]
    if name == "code":
        values = {**values, "image_token_keep_list": [1]}
    with pytest.raises(hidrop.HidropError, match=message):
        schedule_of(of_32_layers(tmp_path, **values), 576)


RUN = {
    "hidrop": (
        {
            **{"model_type": "llava_llama_exit_topk", "late_entry_layer": 2, "early_exit_layer": 4},
            **{"layer_list": "[1,2]", "image_token_keep_list": "[6,3]"},
        },
        hidrop.Schedule(inject=1, prune={1: 6, 2: 3}, exit=3),
    ),
    "pyramiddrop": (
        {"layer_list": [1, 3], "image_token_ratio_list": [0.5, 0.25]},
        hidrop.Schedule(prune={1: 0.5, 3: 0.25}, positions="compact", rounding="floor"),
    ),
}


def load(output: Path, **options: Any) -> Any:
    model = LlavaForConditionalGeneration.from_pretrained(output).eval()
    return hidrop.load(model, output, backend="eager", **options)


def logits(model: Any, image_token: int) -> torch.Tensor:
    inputs = batch(tiny_llava(), [[1, 6, IMAGE, 7, 8], [1, 5, IMAGE, 9, 4]])
    ids = torch.where(inputs["input_ids"] == IMAGE_TOKEN, image_token, inputs["input_ids"])
    with torch.no_grad():
        found: torch.Tensor = model(**{**inputs, "input_ids": ids}).logits[..., :VOCAB]
    return found


@pytest.mark.parametrize("name", RUN)
def test_a_model_runs_under_its_authors_schedule(name: str, tmp_path: Path) -> None:
    values, schedule = RUN[name]
    original = Original(tmp_path, tiny_llava())
    original.config |= values
    original.write()
    output = tmp_path / "made"
    done = hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=output)
    assert done.schedule == schedule
    model = load(output)
    assert hidrop.schedules(model) == {"default": schedule}
    own = hidrop.compile(original.model, schedule, backend="eager")
    found, expected = logits(model, model.config.image_token_id), logits(own, IMAGE_TOKEN)
    torch.testing.assert_close(found, expected)
    plain = logits(hidrop.restore(own), IMAGE_TOKEN)
    assert not torch.allclose(found[:, -1], plain[:, -1])


def test_a_checkpoint_of_fewer_tokens_whose_schedule_nobody_tells(tmp_path: Path) -> None:
    """The authors' scripts give it on the command line; without it the model would run with all tokens, and be worse."""
    original = Original(tmp_path, tiny_llava())
    original.config["model_type"] = "llava_llama_exit_topk"
    original.write()
    output = tmp_path / "made"
    given = {"vision_tower": original.tower, "output": output}
    with pytest.raises(hidrop.HidropError, match=r"exit_topk.*pass the schedule"):
        hidrop.import_llava(original.checkpoint, **given)
    assert not output.exists()
    text = "inject=1,prune=2:4,exit=3"
    done = hidrop.import_llava(original.checkpoint, **given, schedule=text)
    assert done.schedule == hidrop.Schedule.parse(text)
    assert hidrop.schedules(load(output)) == {"default": done.schedule}


def test_a_plain_checkpoint_has_no_schedule(tmp_path: Path) -> None:
    original = Original(tmp_path, tiny_llava())
    original.write()
    output = tmp_path / "made"
    done = hidrop.import_llava(original.checkpoint, vision_tower=original.tower, output=output)
    assert done.schedule is None
    assert not (output / "hidrop.json").exists()


def grown(original: Original, layers: int = 2) -> tuple[nn.ModuleList, dict[str, torch.Tensor]]:
    """Grow a branch of other values, and return it with its layers' weights, numbered from 0."""
    twig = hidrop.grow_twig(original.model, layers=layers, layer=1)
    torch.manual_seed(3)
    for parameter in twig.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return twig, dict(twig.state_dict())


TWIG = "twigvlm(layer=1,average=5,exit=3)"


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_a_side_branch_comes_along(inside: bool, tmp_path: Path) -> None:
    original = Original(tmp_path, tiny_llava())
    twig, values = grown(original)
    heads = {"lm_head.weight": torch.ones(VOCAB, 32), "model.norm.weight": torch.ones(32)}
    if inside:
        own = {f"model.twig_layers.{key}": value for key, value in values.items()}
        own |= {
            "model.twig_norm.weight": torch.ones(32),
            "model.twig_head.weight": torch.ones(2, 2),
        }
        original.write({**original.text, **original.projector, **own})
        given: dict[str, Any] = {}
    else:
        original.write()
        (tmp_path / "twig").mkdir()
        layers = {f"model.layers.{key}": value for key, value in values.items()}
        write_file(tmp_path / "twig" / "model.safetensors", {**layers, **heads})
        given = {"twig": tmp_path / "twig"}
    output = tmp_path / "made"
    done = hidrop.import_llava(
        original.checkpoint, vision_tower=original.tower, output=output, schedule=TWIG, **given
    )
    assert (output / "hidrop_modules.safetensors").exists()
    model = load(output)
    own_model = hidrop.compile(original.model, TWIG, backend="eager", modules={"twig": twig})
    assert done.schedule == hidrop.Schedule.parse(TWIG, 4)
    found = logits(model, model.config.image_token_id)
    torch.testing.assert_close(found, logits(own_model, IMAGE_TOKEN))


def test_a_side_branch_that_is_missing_or_of_another_model(tmp_path: Path) -> None:
    original = Original(tmp_path, tiny_llava())
    original.write()
    given = {"vision_tower": original.tower, "output": tmp_path / "made", "schedule": TWIG}
    with pytest.raises(hidrop.HidropError, match=r"needs 'twig' beside the model.*twig="):
        hidrop.import_llava(original.checkpoint, **given)
    _, values = grown(Original(tmp_path, tiny_llava(hidden_size=16)))
    (tmp_path / "twig").mkdir()
    path = tmp_path / "twig" / "model.safetensors"
    write_file(path, {f"model.layers.{key}": value for key, value in values.items()})
    with pytest.raises(hidrop.HidropError, match=r"'model\.layers\.0\..*' has shape \[16"):
        hidrop.import_llava(original.checkpoint, **given, twig=tmp_path / "twig")
    _, values = grown(original)
    del values["1.mlp.up_proj.weight"]
    write_file(path, {f"model.layers.{key}": value for key, value in values.items()})
    with pytest.raises(hidrop.HidropError, match=r"no weights for 'twig\.1\.mlp\.up_proj\.weight'"):
        hidrop.import_llava(original.checkpoint, **given, twig=tmp_path / "twig")
    write_file(path, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(hidrop.HidropError, match=r"it is no side branch"):
        hidrop.import_llava(original.checkpoint, **given, twig=tmp_path / "twig")
    assert not (tmp_path / "made").exists()
