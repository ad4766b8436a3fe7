"""What a processor returns goes into a compiled model unchanged, and the pipeline answers as Hugging Face's model.

Processors are built without a hub: a word is a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import hidrop_fx as hidrop
from tests.support.families import CASES
from tests.support.families.case import BOS, EOS, IMAGE_TOKEN, PAD, VIDEO_TOKEN, VOCAB
from tests.support.runtimes import compiled_eagerly

SCHEDULE = hidrop.Schedule(inject=1, prune={1: 3, 2: 0.5})


def tokenizer(names: dict[str, int], **special: str) -> Any:
    """A tokenizer of words w0, w1, ...; `names` gives ids to special ones."""
    vocabulary = {f"w{i}": i for i in range(VOCAB) if i not in names.values()}
    vocabulary |= names
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w3",
        padding_side="left", additional_special_tokens=list(names), extra_special_tokens=special,
    )  # fmt: skip
    assert made.convert_tokens_to_ids(list(names)) == list(names.values())
    return made


BASE = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
PLAIN: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def llava_next() -> Any:
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=[[16, 32], [32, 16]], **PLAIN,
    )  # fmt: skip
    words = tokenizer({**BASE, "<image>": IMAGE_TOKEN}, image_token="<image>")
    return hf.LlavaNextProcessor(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def paligemma() -> Any:
    images = hf.SiglipImageProcessorPil(size={"height": 16, "width": 16}, **PLAIN)
    images.image_seq_length = 16
    words = tokenizer({**BASE, "<image>": IMAGE_TOKEN, "\n": 90}, image_token="<image>")
    return hf.PaliGemmaProcessor(images, words)


def idefics3() -> Any:
    names = {"<fake_token_around_image>": 90, "<global-img>": 91, "<image>": IMAGE_TOKEN}
    names |= {"<end_of_utterance>": 89}
    names |= {f"<row_{r}_col_{c}>": 92 + 2 * r + c for r in range(1, 4) for c in range(1, 3)}
    images = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, **PLAIN
    )
    return hf.Idefics3Processor(images, tokenizer({**BASE, **names}), image_seq_len=4)


def gemma3() -> Any:
    images = hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, **PLAIN)
    names = {"<boi>": 90, "<eoi>": 91, "<image>": IMAGE_TOKEN}
    words = tokenizer(
        {**BASE, **names}, image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"
    )
    return hf.Gemma3Processor(images, words, image_seq_length=4)


class WithoutVideos(hf.Qwen2_5_VLProcessor):
    """Its processor of videos needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        return None


def qwen2_5_vl() -> Any:
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 64, "longest_edge": 1024}, **PLAIN,
    )  # fmt: skip
    names = {"<|image_pad|>": IMAGE_TOKEN, "<|video_pad|>": VIDEO_TOKEN}
    names |= {"<|vision_start|>": 100, "<|vision_end|>": 101}
    words = tokenizer({**BASE, **names}, image_token="<|image_pad|>", video_token="<|video_pad|>")
    return WithoutVideos(images, words, None)


PROCESSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "llava_next": (llava_next, "<image>"),
    "paligemma": (paligemma, "<image>"),
    "idefics3": (idefics3, "<image>"),
    "gemma3": (gemma3, "<boi>"),
    "qwen2_5_vl": (qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
}


def pictures(count: int) -> list[Image.Image]:
    drawn = np.random.default_rng(0)
    return [
        Image.fromarray(drawn.integers(0, 255, (20 + 8 * k, 36, 3), dtype=np.uint8))
        for k in range(count)
    ]


def question(token: str, images: int) -> str:
    return " ".join(["w5", *[f"{token} w6"] * images, "w7 w8"])


def answered(model: Any, inputs: Any) -> list[list[int]]:
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return found[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def given(processor: Any, token: str, counts: Sequence[int]) -> Any:
    shown = pictures(sum(counts))
    images = [[shown.pop(0) for _ in range(count)] for count in counts]
    text = [question(token, count) for count in counts]
    return processor(images=images, text=text, padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "idefics3" else pytest.mark.families)
        for name in PROCESSORS
    ],
)
@torch.no_grad()
def test_outputs_of_a_processor_and_the_pipeline(name: str) -> None:
    make, token = PROCESSORS[name]
    processor, model = make(), CASES[name].make()
    inputs = given(processor, token, [1, 2])
    wanted = model(**inputs).logits
    tokens = answered(model, inputs)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    asked = {"images": pictures(1), "text": question(token, 1), "return_full_text": False}

    def told() -> str:
        pipe = hf.pipeline("image-text-to-text", model=model, processor=processor)
        return str(pipe(**asked, generate_kwargs=options)[0]["generated_text"])

    told_before = told()
    with compiled_eagerly(model, hidrop.Schedule()):
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], wanted[real], atol=2e-4, rtol=2e-4)
        assert answered(model, inputs) == tokens
        assert told() == told_before
    with compiled_eagerly(model, SCHEDULE):
        asked_alone = {key: value for key, value in inputs.items() if key != "labels"}
        assert hidrop.compare(model, new_tokens=2, **asked_alone).ok
        told()
