"""Pictures and prompts of an imported model are those of LLaVA's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor

from tests.support.models import VOCAB, tiny_llava
from tests.support.original_llava import Original, imported


@pytest.fixture
def original(tmp_path: Path) -> Original:
    return Original(tmp_path, tiny_llava())


@pytest.mark.parametrize("aspect", ["pad", "square", None])
@pytest.mark.parametrize("size", [(30, 17), (13, 40)])
def test_pictures_are_those_of_llava(original: Original, aspect: str | None, size: Any) -> None:
    """LLaVA pastes a picture on a square of the mean colour, int(255 * mean), and hands that to CLIP's processor."""
    original.config["image_aspect_ratio"] = aspect
    original.write()
    _, done = imported(original)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = picture
    if aspect == "pad":
        side = max(size)
        expected = Image.new("RGB", (side, side), (122, 116, 104))
        expected.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    clip = CLIPImageProcessor.from_pretrained(original.tower)
    processor = AutoProcessor.from_pretrained(done.directory)
    found = processor(images=picture, text="<image>", return_tensors="pt")
    torch.testing.assert_close(
        found["pixel_values"], clip(expected, return_tensors="pt")["pixel_values"]
    )
    assert (found["input_ids"] == VOCAB).sum() == 9


ASKED = [
    {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
    {"role": "user", "content": "red?"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. "
)
PROMPTS = {
    "llama": VICUNA + "USER: <image>\nWhat is this? ASSISTANT: A cat</s>USER: red? ASSISTANT:",
    "mistral": "[INST] <image>\nWhat is this? [/INST] A cat </s>[INST] red? [/INST]",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
    "<|im_start|>assistant\nA cat<|im_end|>\n<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("backbone", PROMPTS)
def test_prompts_are_those_of_llavas_conversations(tmp_path: Path, backbone: str) -> None:
    original = Original(tmp_path, tiny_llava(backbone))
    original.write()
    _, done = imported(original)
    processor = AutoProcessor.from_pretrained(done.directory)
    assert processor.apply_chat_template(ASKED, add_generation_prompt=True) == PROMPTS[backbone]


def test_an_image_between_two_tokens_and_a_system_prompt(original: Original) -> None:
    original.config |= {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}
    original.write()
    model, done = imported(original)
    processor = AutoProcessor.from_pretrained(done.directory)
    said = [{"role": "system", "content": "A chat."}, *ASKED[:1]]
    prompt = processor.apply_chat_template(said, add_generation_prompt=True)
    assert prompt == "A chat. USER: <im_start><image><im_end>\nWhat is this? ASSISTANT:"
    added = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<im_patch>", "<im_end>")]
    assert added == [VOCAB, VOCAB + 2]
    assert model.config.image_token_id == VOCAB + 3


def test_an_answer_is_generated(original: Original) -> None:
    """Text, pictures and model together, through `apply_chat_template`."""
    original.write()
    model, done = imported(original)
    processor = AutoProcessor.from_pretrained(done.directory)
    picture = Image.new("RGB", (20, 10), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True},
        return_tensors="pt",
    )
    assert inputs["input_ids"][0, 0] == 1
    produced = model.generate(**inputs, max_new_tokens=3)
    assert produced.shape[1] > inputs["input_ids"].shape[1]
