"""VLMEvalKit: its messages are answered as `generate` answers, over a stand-in for its base class."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import picture
from hidrop_fx.errors import InputError, ScheduleError
from hidrop_fx.evaluation.loading import load_scheduled
from hidrop_fx.evaluation.vlmevalkit import HidropVLM, vlmeval_model
from hidrop_fx.models.prompts import greedy_answer

torch.set_num_threads(1)
SCHEDULE = "inject=3,prune=5:48,exit=9"
QUESTION = "Which word is at the top?"


class BaseModel:
    """What VLMEvalKit's class of that name does: it checks a message, and hands it to `generate_inner`."""

    def set_dump_image(self, dump_image: Any) -> None:
        self.dump_image_func = dump_image

    def use_custom_prompt(self, dataset: str) -> bool:
        return False

    def generate(self, message: Any, dataset: str | None = None) -> str:
        assert all(item["type"] in self.allowed_types for item in message)  # type: ignore[attr-defined]
        answer: str = self.generate_inner(message, dataset)  # type: ignore[attr-defined]
        return answer


@pytest.fixture
def vlmeval(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vlmeval.vlm.base")
    module.BaseModel = BaseModel  # type: ignore[attr-defined]
    for name in ("vlmeval", "vlmeval.vlm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", module)


@functools.cache
def plain() -> tuple[Any, Any]:
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).eval()
    return model, AutoProcessor.from_pretrained(MODEL_DIR)


def expected(schedule: str, seeds: tuple[int, ...], text: str) -> str:
    model, processor = plain()
    if schedule != "vanilla":
        hidrop.compile(model, schedule, backend="eager")
    images = [picture(seed, "test").image for seed in seeds]
    inputs = processor(images=images, text=text, return_tensors="pt")
    answer = greedy_answer(model, processor, inputs, 4)
    if schedule != "vanilla":
        hidrop.restore(model)
    return answer


def saved(directory: Path, seed: int) -> str:
    path = directory / f"{seed}.png"
    picture(seed, "test").image.save(path)
    return str(path)


@pytest.mark.parametrize("schedule", ["vanilla", SCHEDULE])
def test_messages_are_answered_as_generate_does(
    schedule: str, vlmeval: None, tmp_path: Path
) -> None:
    model = vlmeval_model(schedule=schedule, backend="eager", device="cpu", max_new_tokens=4)
    assert isinstance(model, BaseModel)
    assert isinstance(model, HidropVLM)
    model.set_dump_image(None)
    one = [
        {"type": "image", "value": saved(tmp_path, 0)},
        {"type": "text", "value": QUESTION},
    ]
    assert model.generate(one, dataset="MME") == expected(
        schedule, (0,), f"USER: <image>\n{QUESTION} ASSISTANT:"
    )
    two = [{"type": "image", "value": saved(tmp_path, 1)}, *one]
    two_images = expected(schedule, (1, 0), f"USER: <image>\n<image>\n{QUESTION} ASSISTANT:")
    assert model.generate(two) == two_images
    turns = [
        {"role": "user", "content": one},
        {"role": "assistant", "content": [{"type": "text", "value": "map"}]},
        {"role": "user", "content": [{"type": "text", "value": "And which digit?"}]},
    ]
    written = f"USER: <image>\n{QUESTION} ASSISTANT: map USER: And which digit? ASSISTANT:"
    assert model.chat_inner(turns) == expected(schedule, (0,), written)


def test_other_parts_are_refused() -> None:
    model = HidropVLM(schedule="vanilla", device="cpu")
    with pytest.raises(
        InputError, match="a part of type 'audio'; a model takes text, image, video"
    ):
        model.generate_inner([{"type": "audio", "value": "a.wav"}])


def test_a_directory_brings_its_schedules(tmp_path: Path) -> None:
    model, processor = plain()
    hidrop.compile(model, {"fast": SCHEDULE, "full": "identity"}, backend="eager")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    hidrop.restore(model)
    options = {"backend": "eager", "device": "cpu"}
    found = load_scheduled(str(tmp_path), **options)
    assert str(hidrop.Schedule.parse(SCHEDULE)) == str(hidrop.schedules(found.model)["fast"])
    for name, layers in (("fast", 9), ("full", 12)):
        named = load_scheduled(str(tmp_path), name, **options)
        with named.in_use() as schedule:
            assert (schedule.exit or 12) == layers
    assert not hidrop.is_compiled(load_scheduled(str(tmp_path), "vanilla", **options).model)
    with pytest.raises(ScheduleError, match="slow"):
        load_scheduled(str(tmp_path), "slow", **options)
