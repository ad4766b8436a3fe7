"""What works for LLaVA works for a class with tiles, with videos, with position ids on three axes, with masks of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from tests.support.families import CASES, IMAGE, ROWS, VIDEO, make_batch
from tests.support.generation import KEEPS_IMAGES_TOGETHER
from tests.support.runtimes import compiled_eagerly

NAMES = ("idefics3", "qwen2_5_vl", "gemma3", "paligemma2", "lfm2_vl")
SCHEDULE = hidrop.Schedule(inject=1, prune={1: 3, 2: 0.5})

pytestmark = pytest.mark.usefixtures("one_capture_a_model")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: CASES[name].make() for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_compare_and_explain(name: str, models: dict[str, Any]) -> None:
    case, model = CASES[name], models[name]
    batch = make_batch(case, model, ROWS)
    for schedule in (hidrop.Schedule(), SCHEDULE):
        with compiled_eagerly(model, schedule):
            assert hidrop.compare(model, new_tokens=2, **batch.inputs).ok
    with compiled_eagerly(model, SCHEDULE):
        text = str(hidrop.explain(model, **batch.inputs))
    for row in batch.rows:
        assert str(min(3 * row.items, len(row.features))) in text


@torch.no_grad()
def test_features_encoded_before_are_those_of_the_pixels(name: str, models: dict[str, Any]) -> None:
    case, model = CASES[name], models[name]
    inputs = make_batch(case, model, ROWS).inputs
    encoder = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes")
    given = {k: inputs[k] for k in encoder if k in inputs}
    with compiled_eagerly(model, SCHEDULE):
        expected = model(**inputs).logits
        encoded = model.model.get_image_features(**given, return_dict=True)
        rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
        found = model(**rest, mm_encoder_outputs={"image": encoded}).logits
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_second_turn_and_beams_are_hugging_face_s(name: str, models: dict[str, Any]) -> None:
    case, model = CASES[name], models[name]
    inputs = make_batch(case, model, [ROWS[0], ROWS[1]]).inputs

    def turns() -> list[Any]:
        first = model.generate(
            **dict(inputs), max_new_tokens=3, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True,
        )  # fmt: skip
        ids = torch.cat([first.sequences, torch.tensor([[21, 22], [23, 24]])], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
        second = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values,
            max_new_tokens=3, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        if not KEEPS_IMAGES_TOGETHER:
            return [second.tolist()]
        beams = model.generate(
            **dict(inputs), max_new_tokens=3, do_sample=False, num_beams=2, eos_token_id=None
        )
        return [second.tolist(), beams.tolist()]

    expected = turns()
    with compiled_eagerly(model, hidrop.Schedule()):
        assert turns() == expected


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["glm4v", pytest.param("granite4_vision", marks=pytest.mark.families)]
)
@pytest.mark.skipif(not KEEPS_IMAGES_TOGETHER, reason="no such step in this transformers")
def test_copies_of_a_row_have_its_images_in_their_order(name: str) -> None:
    """Also where the class itself repeats each image of a row before the next."""
    case = CASES[name]
    model = case.make()
    inputs = make_batch(case, model, ROWS[:2]).inputs
    alone = model(**inputs).logits[:, -1]
    with compiled_eagerly(model, hidrop.Schedule()):
        out = model.generate(
            **dict(inputs), max_new_tokens=2, do_sample=True, num_return_sequences=2, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    torch.testing.assert_close(out.logits[0], alone.repeat_interleave(2, 0), atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, models: dict[str, Any]) -> None:
    case, model = CASES["qwen2_5_vl"], models["qwen2_5_vl"]
    inputs = make_batch(case, model, [ROWS[0], [5, VIDEO, 6, IMAGE, 7]]).inputs
    with compiled_eagerly(model, SCHEDULE):
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    hidrop.load(again, tmp_path, backend="eager")
    torch.testing.assert_close(again(**inputs).logits, expected)
