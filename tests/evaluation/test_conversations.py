"""Conversations as batches: without a chat template, and with videos, which the processors here cannot read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.build import build_config
from hidrop_fx.demo.pictures import picture
from hidrop_fx.errors import InputError
from hidrop_fx.evaluation.answering import answered
from hidrop_fx.evaluation.conversations import (
    conversation_inputs,
    image_part,
    text_part,
    turn,
    video_part,
)
from hidrop_fx.evaluation.generation import Generation
from tests.support.families import CASES, VIDEO, make_batch

torch.set_num_threads(1)
QUESTION = "Which word is at the top?"


@pytest.mark.parametrize("schedule", [None, "inject=1,exit=2"])
def test_videos_are_answered_and_counted(schedule: str | None) -> None:
    case = CASES["llava_onevision"]
    model = case.make()
    batch = make_batch(case, model, [[5, VIDEO, 6, 7], [8, VIDEO, 9, 10, VIDEO, 11], [13, 14]])
    told: list[Any] = []

    def apply_chat_template(conversations: Any, **options: Any) -> Any:
        told.append((conversations, options))
        return batch.inputs

    def batch_decode(tokens: Any, **_: Any) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in tokens]

    processor = SimpleNamespace(
        chat_template="a template",
        apply_chat_template=apply_chat_template,
        batch_decode=batch_decode,
    )
    if schedule is not None:
        model = hidrop.compile(model, schedule, backend="eager")
    asked = [[turn("user", video_part("a.mp4"), text_part(QUESTION))]] * 3
    generation = Generation.of_task({"max_new_tokens": 3})
    found = answered(model, processor, asked, generation, num_frames=4)
    tokens = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    start = batch.inputs["input_ids"].shape[1]
    assert [one.text for one in found.answers] == batch_decode(tokens[:, start:])
    ((conversations, options),) = told
    assert conversations[0][0]["content"][0] == {"type": "video", "video": "a.mp4"}
    assert options["processor_kwargs"] == {
        "padding": True,
        "padding_side": "left",
        "num_frames": 4,
    }
    places = (batch.inputs["input_ids"] == model.config.video_token_id).sum(dim=1).tolist()
    layers = model.config.text_config.num_hidden_layers
    share = 1 if schedule is None else 1 / layers
    assert [one.vision_tokens for one in found.answers] == [share * count for count in places]
    assert min(places[:2]) > 0


def test_a_video_without_a_chat_template_is_refused() -> None:
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    processor.chat_template = None
    with pytest.raises(InputError, match="a video for LlavaProcessor, which has no chat template"):
        conversation_inputs(None, processor, [[turn("user", video_part("a.mp4"))]])


def test_without_a_chat_template_llavas_own_words_are_written() -> None:
    model = LlavaForConditionalGeneration(build_config())
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    bare = AutoProcessor.from_pretrained(MODEL_DIR)
    bare.chat_template = None
    image = picture(0, "test").image
    asked = [
        [turn("user", image_part(image), text_part(QUESTION))],
        [turn("user", text_part("Which digit?"))],
    ]
    found = conversation_inputs(model, bare, asked)
    texts = [f"USER: <image>\n{QUESTION} ASSISTANT:", "USER: Which digit? ASSISTANT:"]
    written = processor(
        images=[image], text=texts, return_tensors="pt", padding=True, padding_side="left"
    )
    assert set(found) == set(written)
    for name in found:
        assert torch.equal(found[name], written[name]), name
