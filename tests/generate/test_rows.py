"""Rows of a batch give what they give alone."""

from __future__ import annotations

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from tests.support.generation import new_tokens
from tests.support.models import (
    EOS,
    IMAGE,
    Make,
    batch,
    tiny_llava,
)
from tests.support.prompts import ROW, ROWS, Row, Side, each_schedule
from tests.support.reference import reference_generate, reference_logits


@each_schedule
@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_row_gives_what_it_gives_alone(compiled: Make, schedule: str, padding: Side) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS, padding=padding, pad_to=24)
    together = new_tokens(model, inputs)
    images = iter(inputs["pixel_values"])
    for row, tokens in zip(ROWS, together, strict=True):
        alone = batch(model, [row])
        if pixels := [next(images) for item in row if item == IMAGE]:
            alone["pixel_values"] = torch.stack(pixels)
        assert new_tokens(model, alone)[0] == tokens


def test_beams_of_each_row_are_those_it_has_alone(compiled: Make) -> None:
    model = compiled()
    rows: list[Row] = [ROW, [4, 5, 6, 7, 8], [8, IMAGE]]
    inputs = batch(model, rows, padding="left")
    together = new_tokens(model, inputs, num_beams=3)
    pixels = iter(inputs["pixel_values"])
    for row, tokens in zip(rows, together, strict=True):
        alone = batch(model, [row])
        if IMAGE in row:
            alone["pixel_values"] = next(pixels)[None]
        assert new_tokens(model, alone, num_beams=3)[0] == tokens


@each_schedule
def test_a_prompt_that_ends_with_an_image_equals_the_row_alone(
    compiled: Make, schedule: str
) -> None:
    model = compiled("qwen3", schedule)
    batches: list[list[Row]] = [[[4, 5, IMAGE]], [[IMAGE]], [[IMAGE, IMAGE], [3]]]
    for rows in batches:
        inputs = batch(model, rows)
        expected = reference_generate(model, hidrop.Schedule.parse(schedule), inputs, 5)
        assert new_tokens(model, inputs) == expected


@each_schedule
def test_answers_of_other_lengths_agree_on_their_prefix(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    parsed = hidrop.Schedule.parse(schedule)
    for rows, count in (
        ([ROW], 1),
        (ROWS, 1),
        ([[3, 4, 5]], 3),
        ([[3]], 2),
        ([[*range(3, 60), IMAGE, 4]], 4),
        (ROWS, 7),
        ([ROW, ROW], 2),
    ):
        inputs = batch(model, rows)
        expected = reference_generate(model, parsed, inputs, count)
        assert new_tokens(model, inputs, max_new_tokens=count) == expected


@each_schedule
def test_text_without_images_is_hf_under_any_schedule(
    compiled: Make, plain: Make, schedule: str
) -> None:
    hf, model = plain(), compiled("llama", schedule)
    inputs = batch(hf, [[3, 4, 5, 6, 7], [8, 9]])
    assert new_tokens(model, inputs) == new_tokens(hf, inputs)


@each_schedule
def test_generation_stops_at_the_end_token(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, ROWS)
    endless = new_tokens(model, inputs, max_new_tokens=8)
    end = endless[0][2]
    expected = []
    for tokens in endless:
        stop = tokens.index(end) + 1 if end in tokens else len(tokens)
        expected.append(tokens[:stop])
    longest = max(map(len, expected))
    padded = [tokens + [0] * (longest - len(tokens)) for tokens in expected]
    assert new_tokens(model, inputs, max_new_tokens=8, eos_token_id=end) == padded
    (alone,) = new_tokens(model, batch(model, [ROW]), max_new_tokens=8, eos_token_id=[EOS, end])
    assert end not in alone[:-1]


@pytest.mark.parametrize("words", [3, 4, 5])
@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("positions", ["persistent", "compact", "group"])
def test_rounded_lengths_have_room_for_outputs_at_places_of_images(
    words: int, supervised: bool, positions: str
) -> None:
    """Such a token is text: one more there and one fewer among the vision tokens may round to more in all."""
    model = tiny_llava(num_layers=3, image_tokens=4)
    schedule = Schedule.parse(f"inject=1,prune=1:1.0,exit=2,positions={positions}")
    inputs = batch(model, [[*range(5, 5 + words), IMAGE, *([9] if supervised else [])]])
    if supervised:
        model.train()
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        inputs["labels"][:, -1] = 9
    expected = reference_logits(model, schedule, inputs)
    hidrop.compile(model, schedule, backend="eager", cuda_graphs=True, bucket_multiple=4)
    output = model(**inputs)
    if supervised:
        assert output.loss is not None
        last = output.logits[:, output.logit_columns[0] == inputs["input_ids"].shape[1] - 2]
        torch.testing.assert_close(last[:, 0], expected[:, -2], rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(output.logits[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
