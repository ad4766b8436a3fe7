"""Integer keeps per item, tile, frame and sample."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hidrop_fx as hidrop
from hidrop_fx.cli import app
from tests.support.families import CASES, IMAGE, VIDEO, make_batch
from tests.support.families.tiles import tiles_of
from tests.support.runtimes import compiled_eagerly, last_layout

IMAGES = [[5, IMAGE, 6, 7], [8, IMAGE, 9, 10, IMAGE, 11], [13, 14]]
VIDEOS = [[5, VIDEO, 6, 7], [8, VIDEO, 9, 10, VIDEO, 11], [13, 14]]
TILES = [tiles_of(0), tiles_of(1) + tiles_of(2), 0]
FRAMES = [2, 4, 0]

pytestmark = pytest.mark.usefixtures("one_capture_a_model")


@pytest.mark.parametrize(
    ("name", "per", "rows", "units"),
    [
        ("internvl", "tile", IMAGES, TILES),
        ("aya_vision", "tile", IMAGES, TILES),
        ("idefics3", "tile", IMAGES, TILES),
        ("qwen2_5_vl", "tile", IMAGES, [1, 2, 0]),
        ("llava", "tile", IMAGES, [1, 2, 0]),
        ("qwen2_5_vl", "frame", VIDEOS, FRAMES),
        ("qwen3_vl", "frame", VIDEOS, FRAMES),
        ("glm4v", "frame", VIDEOS, FRAMES),
        ("video_llava", "frame", VIDEOS, FRAMES),
        ("internvl", "frame", IMAGES, [1, 2, 0]),
        ("qwen2_5_vl", "item", VIDEOS, [1, 2, 0]),
        ("glm4v", "item", VIDEOS, [1, 2, 0]),
        ("qwen3_vl", "sample", [[5, VIDEO, 6, IMAGE, 7], [8, IMAGE, 9]], [1, 1]),
        ("qwen3_vl", "frame", [[5, VIDEO, 6, IMAGE, 7], [8, IMAGE, 9]], [3, 1]),
    ],
)
@torch.no_grad()
def test_a_keep_counts_units(name: str, per: str, rows: Any, units: list[int]) -> None:
    case = CASES[name]
    model = case.make()
    batch = make_batch(case, model, rows)
    schedule = hidrop.Schedule(prune={1: 2}, per=per)
    with compiled_eagerly(model, schedule):
        model(**batch.inputs)
        layout = last_layout(model)
        report = hidrop.inspect(model)
        told = str(hidrop.explain(model, **batch.inputs))
    there = [len(row.features) for row in batch.rows]
    expected = [min(2 * n, v) for n, v in zip(units, there, strict=True)]
    assert layout.vision_counts["prune_1"] == expected
    assert layout.images == [row.items for row in batch.rows]
    assert report.layers[1].vision_tokens == expected[0]
    assert ("tiles" in told, "frames" in told) == (per == "tile", per == "frame")


@pytest.mark.parametrize(
    ("name", "per"),
    [("llava_next", "tile"), ("llava_next_video", "frame"), ("video_llama_3", "frame")],
)
def test_what_cannot_be_counted_is_refused(name: str, per: str) -> None:
    model = CASES[name].make()
    with pytest.raises(hidrop.ScheduleError, match=f"per='{per}': the encoder of .*use per='item'"):
        hidrop.compile(model, f"prune=1:2,per={per}", backend="eager")
    assert not hidrop.is_compiled(model)


@pytest.mark.parametrize(
    ("name", "schedule", "lines"),
    [
        ("internvl", "prune=1:2", 1),
        ("smolvlm", "prune=1:2", 1),
        ("idefics2", "prune=1:2", 1),
        ("internvl", "prune=1:0.5", 0),
        ("smolvlm", "prune=1:2,per=sample", 0),
        ("idefics3", "prune=1:2", 0),
    ],
)
def test_frames_that_count_as_images_are_told(
    name: str, schedule: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = CASES[name].make()
    with caplog.at_level(logging.INFO, "hidrop_fx"):
        hidrop.compile(model, schedule, backend="eager")
    told = [r.getMessage() for r in caplog.records if "images of their own" in r.getMessage()]
    assert len(told) == lines
    assert all(line.startswith(type(model).__name__) and "per='sample'" in line for line in told)


@torch.no_grad()
def test_frames_need_their_position_ids() -> None:
    case = CASES["qwen2_5_vl"]
    model = case.make()
    inputs = make_batch(case, model, [[5, VIDEO, 6, 7]]).inputs
    plain = torch.arange(inputs["input_ids"].shape[1])[None]
    with (
        compiled_eagerly(model, "prune=1:2,per=frame"),
        pytest.raises(hidrop.InputError, match="position ids of time, height and width"),
    ):
        model(**inputs, position_ids=plain)


def test_text_json_and_plan() -> None:
    schedule = hidrop.Schedule.parse("prune=1:20,per=tile")
    assert hidrop.Schedule.parse(str(schedule)) == schedule
    assert hidrop.Schedule.from_json(schedule.to_json()).per == "tile"
    sizes = {"num_layers": 3, "hidden_size": 8, "intermediate_size": 8, "vision_tokens": 500}
    costs = hidrop.plan(schedule, **sizes, images=2, units=5)
    assert costs.vision_tokens[1] == 100
    assert "2 images, kept per tile, 5 of them" in str(costs)
    assert hidrop.plan("prune=1:20,per=sample", **sizes, images=2).vision_tokens[1] == 20
    with pytest.raises(hidrop.ScheduleError, match="per='image'; use one of 'item', 'tile'"):
        hidrop.Schedule(per="image")


def test_the_command_line() -> None:
    given = ["plan", "--schedule", "prune=1:20,per=frame", "--units", "7", "--json"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["vision_tokens"][1] == 140
