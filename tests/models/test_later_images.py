"""New images behind a cache in a class with position ids on three axes, and images of all turns: as the whole conversation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from tests.support.families import CASES, IMAGE, Case, make_batch
from tests.support.runtimes import compiled_eagerly

FIRST = [[5, IMAGE, 6, 7], [8, 9, 10], [4, IMAGE, 11]]
SECOND = [[12, IMAGE, 13], [14, IMAGE, 15, IMAGE, 16, 17], [18, 19]]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def by_row(inputs: dict[str, Tensor], rows: list[list[Any]]) -> list[list[Any]]:
    """Return pixels and grids of each image, row by row."""
    grids = inputs.get("image_grid_thw")
    counts = [1] * len(inputs["pixel_values"]) if grids is None else grids.prod(dim=1).tolist()
    pixels = inputs["pixel_values"].split(counts)
    images = iter(zip(pixels, [None] * len(pixels) if grids is None else grids, strict=True))
    return [[next(images) for item in row if item == IMAGE] for row in rows]


def whole(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the conversation as one prompt, with the images of both turns row after row."""
    names = [n for n in ("input_ids", "attention_mask", "mm_token_type_ids") if n in first]
    both = {name: torch.cat([first[name], second[name]], dim=1) for name in names}
    rows = zip(by_row(first, FIRST), by_row(second, SECOND), strict=True)
    images = [image for old, new in rows for image in (*old, *new)]
    both["pixel_values"] = torch.cat([pixels for pixels, _ in images])
    if "image_grid_thw" in first:
        both["image_grid_thw"] = torch.stack([grid for _, grid in images])
    return both


def counted(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ids that count real tokens, for a class that would count padding between turns."""
    if case.typed:
        return {}
    return {"position_ids": (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_conversation_in_turns_is_the_whole_one(name: str) -> None:
    """Under Hugging Face, and where vision tokens enter late and leave early, which no text has a say in."""
    case = CASES[name]
    model = case.make()
    first, second = (make_batch(case, model, rows).inputs for rows in (FIRST, SECOND))
    second["pixel_values"] = -second["pixel_values"]
    full = whole(first, second)
    length = first["input_ids"].shape[1]
    real = second["attention_mask"].bool()
    for schedule in ("identity", "inject=1,exit=3"):
        given = hidrop.Schedule.parse(schedule)
        expected = model(**full | counted(case, full)).logits
        with compiled_eagerly(model, given):
            if schedule != "identity":
                expected = model(**full | counted(case, full)).logits
            answer = model.generate(**full, **GREEDY)
            cache = model(**first | counted(case, first)).past_key_values
            mask = full["attention_mask"]
            found = model(**second | {"attention_mask": mask}, past_key_values=cache)
            shown = expected[:, length:][real]
            kept = shown.abs().sum(dim=-1) > 0  # all but vision tokens that left
            torch.testing.assert_close(found.logits[real][kept], shown[kept], rtol=1e-3, atol=1e-4)
            # The images of both turns, as a processor makes them of the whole conversation.
            cache = model(**first | counted(case, first)).past_key_values
            turn = model.generate(**full, past_key_values=cache, **GREEDY)
        assert torch.equal(turn, answer)


@torch.no_grad()
def test_a_turn_of_text_goes_on_behind_new_images() -> None:
    case = CASES["qwen2_5_vl"]
    model = case.make()
    first, second = (make_batch(case, model, rows).inputs for rows in (FIRST, SECOND))
    full = whole(first, second)
    more = torch.tensor([[21, 22], [23, 24], [25, 26]])
    ids = torch.cat([full["input_ids"], more], dim=1)
    mask = torch.cat([full["attention_mask"], torch.ones_like(more)], dim=1)
    types = torch.cat([full["mm_token_type_ids"], torch.zeros_like(more)], dim=1)
    given = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    with compiled_eagerly(model, hidrop.Schedule.parse("inject=1,exit=3")):
        pixels = {k: full[k] for k in ("pixel_values", "image_grid_thw")}
        expected = model.generate(**given, **pixels, **GREEDY)
        cache = model(**first).past_key_values
        cache = model(
            **second | {"attention_mask": full["attention_mask"]}, past_key_values=cache
        ).past_key_values
        found = model.generate(**given, past_key_values=cache, **GREEDY)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_images_of_all_turns_without_position_ids_are_refused() -> None:
    case = CASES["qwen2_5_vl"]
    model = case.make()
    first, second = (make_batch(case, model, rows).inputs for rows in (FIRST, SECOND))
    full = whole(first, second)
    pixels = {k: full[k] for k in ("pixel_values", "image_grid_thw")}
    with compiled_eagerly(model, hidrop.Schedule()):
        cache = model(**first).past_key_values
        with pytest.raises(
            hidrop.InputError, match=r"earlier turns came too, without position_ids"
        ):
            model(
                **second | pixels | {"attention_mask": full["attention_mask"]},
                past_key_values=cache,
            )
