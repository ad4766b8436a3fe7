"""The demo task of the comparison: pictures, questions about them, and how answers are marked.

Five kinds of questions are answered by one word; the sixth, `sentence`, by 16 to 22 words, all of them in the shipped
tokenizer. Questions that find a thing by its name ("Where is the owl?") are left out: the start did not learn them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava_data import padded, tokenized
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hidrop_fx.analysis.data.records import Record
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.batches import pixel_values
from hidrop_fx.demo.pictures import (
    COLUMNS,
    QUESTION_KINDS,
    ROWS,
    Cell,
    Picture,
    Question,
    all_questions,
    picture,
    prompt,
)

SENTENCE = "sentence"
SHORT_KINDS = tuple(kind for kind in QUESTION_KINDS if kind != "place")
KINDS = (*SHORT_KINDS, SENTENCE)
FINDS = ("Where", "What colour")
FIRST_TEST_PICTURE = 300_000
FIRST_CALIBRATION_PICTURE = 500_000
IMAGE_TOKENS = 144
LONGEST = 26
"""Tokens of the longest sentence, its end included, and one more."""


@dataclass(frozen=True)
class Sentence:
    """A question that is answered by a sentence, with one `<image>` in its prompt."""

    prompt_text: str
    answer: str
    kind: str = SENTENCE


def sentences(drawn: Picture) -> list[Sentence]:
    """Say what stands in each row and each column of a picture.

    >>> What is at the top? -> a red 7 is at the left , a blue cat is at the centre and nothing is at the right .
    """
    asked = []
    for index, name in enumerate(ROWS):
        cells = [one for one in drawn.cells if one.row == index]
        asked.append(_sentence(name, [_told(one, COLUMNS[one.column]) for one in cells]))
    for index, name in enumerate(COLUMNS):
        cells = [one for one in drawn.cells if one.column == index]
        asked.append(_sentence(name, [_told(one, ROWS[one.row]) for one in cells]))
    return asked


def _told(cell: Cell, place: str) -> str:
    thing = "nothing" if cell.kind == "empty" else f"a {cell.colour} {cell.value}"
    return f"{thing} is at the {place}"


def _sentence(place: str, parts: Sequence[str]) -> Sentence:
    first, second, third = parts
    return Sentence(prompt(f"What is at the {place}?"), f"{first} , {second} and {third} .")


def asked_about(drawn: Picture, seed: int) -> list[Question | Sentence]:
    """Return one question of every kind that the picture allows, drawn by `seed`; a sentence comes last."""
    rng = np.random.default_rng([seed, 5])
    asked = [one for one in all_questions(drawn) if not one.sentence.startswith(FINDS)]
    chosen: list[Question | Sentence] = []
    for kind in SHORT_KINDS:
        candidates = [one for one in asked if one.kind == kind]
        if candidates:
            chosen.append(candidates[int(rng.integers(len(candidates)))])
    return [*chosen, sentences(drawn)[int(rng.integers(6))]]


def calibration_records(count: int) -> list[Record]:
    """Return pictures with questions and answers, other than those that are asked for the results."""
    records: list[Record] = []
    for seed in range(FIRST_CALIBRATION_PICTURE, FIRST_CALIBRATION_PICTURE + count):
        drawn = picture(seed, "test")
        for one in asked_about(drawn, seed):
            text = one.prompt_text.split("\n", 1)[1].removesuffix(" ASSISTANT:")
            records.append(Record(images=(drawn.image,), prompt=text, answer=one.answer))
    return records[:count]


# Models.


class FrozenTower(nn.Module):
    """A tower that takes its own states [n, 145, D] in the place of pixels and returns them."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, hidden_states=(pixel_values,)
        )


@cache
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL_DIR)


def start_model(start: Path, *, tower: bool = True) -> Any:
    """Load the shipped model with the start's projector and decoder; without `tower` it takes `features`."""
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    left = model.load_state_dict(load_file(start), strict=False)
    strange = [name for name in left.missing_keys if "vision_tower" not in name]
    if left.unexpected_keys or set(strange) - {"lm_head.weight"}:
        raise ValueError(f"{start} is no start of this model: {strange}, {left.unexpected_keys}")
    if not tower:
        model.model.vision_tower = FrozenTower()
    return model.eval()


@cache
def _tower() -> nn.Module:
    return LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).model.vision_tower.eval()


@torch.no_grad()
def features(drawn: Sequence[Picture]) -> Tensor:
    """Run the tower: [n, 145, D]."""
    return torch.cat([_tower()(part).last_hidden_state for part in pixel_values(drawn).split(20)])


# Held-out questions.


@dataclass(frozen=True)
class HeldOut:
    """Pictures as pixels and as features, and the questions about them by the picture's index."""

    pixels: Tensor
    features: Tensor
    asked: tuple[tuple[int, Question | Sentence], ...]


@cache
def held_out(seed: int, pictures: int) -> HeldOut:
    """Draw the pictures of a seed, each with one question of every kind."""
    first = FIRST_TEST_PICTURE + 10_000 * seed
    drawn = [picture(number, "test") for number in range(first, first + pictures)]
    asked = tuple(
        (index, one)
        for index, shown in enumerate(drawn)
        for one in asked_about(shown, first + index)
    )
    return HeldOut(pixel_values(drawn), features(drawn), asked)


@torch.no_grad()
def answers(model: Any, shown: HeldOut, *, tower: bool, size: int = 48) -> list[str]:
    """Return the greedy answers to all held-out questions, in their order."""
    images = shown.pixels if tower else shown.features
    texts = [""] * len(shown.asked)
    for long in (False, True):
        chosen = [i for i, (_, one) in enumerate(shown.asked) if (one.kind == SENTENCE) == long]
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            inputs = _prompts([shown.asked[i][1].prompt_text for i in part])
            produced = model.generate(
                **inputs,
                pixel_values=images[[shown.asked[i][0] for i in part]],
                do_sample=False,
                max_new_tokens=LONGEST if long else 4,
            )
            fresh = produced[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(
                part, processor().batch_decode(fresh, skip_special_tokens=True), strict=True
            ):
                texts[i] = text.strip()
    return texts


def _prompts(texts: Sequence[str]) -> dict[str, Tensor]:
    rows = [tokenized([(text, False)], processor(), IMAGE_TOKENS)[0] for text in texts]
    ids = padded([row.flip(0) for row in rows], processor().tokenizer.pad_token_id).flip(1)
    mask = padded([torch.ones_like(row) for row in rows], 0).flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def marks(shown: HeldOut, texts: Sequence[str]) -> dict[str, float]:
    """Mark answers: the share of exact ones over all and by kind, and the share of right words in sentences.

    A word is right that stands where it stands in the right answer.
    """
    exact: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    words: list[bool] = []
    for (_, one), text in zip(shown.asked, texts, strict=True):
        exact[one.kind].append(text == one.answer)
        if one.kind == SENTENCE:
            said, right = text.split(), one.answer.split()
            words += [i < len(said) and said[i] == word for i, word in enumerate(right)]
    every = [hit for hits in exact.values() for hit in hits]
    shares = {"all": every, **exact, "words": words}
    return {name: round(sum(hits) / len(hits), 4) for name, hits in shares.items() if hits}
