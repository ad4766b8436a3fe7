"""LLaVA with every vision tower: equal to Hugging Face, and to the reference under a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import hidrop_fx as hidrop
from tests.support.generation import KEEPS_IMAGES_TOGETHER, new_tokens
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import PRUNED, random_labels
from tests.support.reference import reference_generate, reference_logits
from tests.support.runtimes import last_layout
from tests.support.towers import TOWERS, image_tokens, sized_batch, tiny_tower

MIXED: Any = [[5, (2, 3), 7, 8], [9, (4, 2), 6, (1, 3), 9, 10], [3, 4, 5]]
"""Rows of one, two and no images, each of a size of its own."""
FRACTIONS = "inject=1,prune=1:0.6+2:0.3,exit=3"


@pytest.fixture(scope="module")
def pixtral() -> Any:
    return tiny_tower("pixtral")


@pytest.fixture(scope="module")
def pruned_pixtral() -> Any:
    return hidrop.compile(tiny_tower("pixtral"), PRUNED, backend="eager")


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_towers_of_one_size(tower: str) -> None:
    tokens = image_tokens(tower)
    hf, model = tiny_tower(tower), tiny_tower(tower)
    one = sized_batch(hf, [[5, (3, 3), 7, 8]], tokens=tokens)
    several = sized_batch(hf, [[5, (3, 3), 7], [8, (3, 3), (3, 3), 9]], tokens=tokens)
    hidrop.compile(model, "identity", backend="eager")
    assert torch.equal(model(**one).logits, hf(**one).logits)
    assert new_tokens(model, several) == new_tokens(hf, several)
    hidrop.compile(model, PRUNED, backend="eager")
    schedule = hidrop.Schedule.parse(PRUNED)
    assert new_tokens(model, several) == reference_generate(hf, schedule, several, 5)
    assert last_layout(model).images == [1, 2]
    assert hidrop.plan(PRUNED, model).total_vision_tokens == tokens


@torch.no_grad()
def test_images_of_several_sizes_give_the_logits_of_hf(pixtral: Any) -> None:
    model = hidrop.compile(tiny_tower("pixtral"), "identity", backend="eager")
    one = sized_batch(model, [[5, (2, 3), 7, (4, 4), 8]])
    assert torch.equal(model(**one).logits, pixtral(**one).logits)
    for padding in ("left", "right"):
        inputs = sized_batch(model, MIXED, padding=padding)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(
            model(**inputs).logits[real], pixtral(**inputs).logits[real], rtol=1e-4, atol=1e-4
        )
    assert last_layout(model).images == [1, 2, 0]
    assert hidrop.inspect(model).vision_tokens == (6, 11, 0)


@pytest.mark.parametrize("schedule", [PRUNED, FRACTIONS, PRUNED + ",positions=compact"])
@torch.no_grad()
def test_a_schedule_over_images_of_several_sizes(pixtral: Any, schedule: str) -> None:
    model = hidrop.compile(tiny_tower("pixtral"), schedule, backend="eager")
    inputs = sized_batch(model, MIXED)
    wanted = hidrop.Schedule.parse(schedule)
    torch.testing.assert_close(
        model(**inputs).logits, reference_logits(pixtral, wanted, inputs), rtol=1e-4, atol=1e-4
    )
    assert new_tokens(model, inputs) == reference_generate(pixtral, wanted, inputs, 5)


@torch.no_grad()
def test_generation_modes_over_images_of_several_sizes(pixtral: Any) -> None:
    model = hidrop.compile(tiny_tower("pixtral"), "identity", backend="eager")
    inputs = sized_batch(model, MIXED)
    for options in (
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"output_scores": True, "return_dict_in_generate": True},
    ):
        found = []
        if options.keys() & {"num_beams", "num_return_sequences"} and not KEEPS_IMAGES_TOGETHER:
            continue
        for each in (model, pixtral):
            torch.manual_seed(1)
            answer = each.generate(**inputs, **{"max_new_tokens": 4, "do_sample": False, **options})
            found.append(getattr(answer, "sequences", answer))
        assert torch.equal(*found), options


@torch.no_grad()
def test_without_sizes_every_image_is_all_of_its_pixels(pixtral: Any) -> None:
    model = hidrop.compile(tiny_tower("pixtral"), "identity", backend="eager")
    inputs = sized_batch(model, [[5, (2, 3), 7], [8, (2, 3), (2, 3), 9]])
    del inputs["image_sizes"]
    real = inputs["attention_mask"].bool()
    expected = pixtral(**inputs).logits[real]
    torch.testing.assert_close(model(**inputs).logits[real], expected, rtol=1e-4, atol=1e-4)
    assert new_tokens(model, inputs) == new_tokens(pixtral, inputs)
    assert last_layout(model).images == [1, 2]


@pytest.mark.parametrize("schedule", ["identity", PRUNED])
def test_training_on_images_of_several_sizes(schedule: str) -> None:
    model, plain = tiny_tower("pixtral").train(), tiny_tower("pixtral").train()
    inputs = sized_batch(plain, MIXED, padding="right")
    inputs["labels"] = random_labels(inputs)
    inputs["labels"][:, 0] = -100
    hidrop.compile(model, schedule, backend="eager")
    loss, gradients = step(model, inputs)
    plain.zero_grad(set_to_none=True)
    if schedule == "identity":
        expected = plain(**inputs).loss
    else:
        logits = reference_logits(plain, hidrop.Schedule.parse(schedule), inputs)
        expected = plain.loss_function(
            logits=logits, labels=inputs["labels"], vocab_size=logits.shape[-1]
        )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert_gradients_close(gradients, theirs, rel=1e-3, atol=1e-3)


def test_learned_ratios_start_at_fractions_of_images_of_any_size() -> None:
    model = tiny_tower("pixtral")
    with pytest.raises(hidrop.ScheduleError, match=r"prune layer 1 keeps, but keeps 6 of images"):
        hidrop.compile(model, PRUNED + ",selection=dtopk", backend="eager")
    assert not hidrop.is_compiled(model)
    hidrop.compile(model, FRACTIONS + ",selection=dtopk", backend="eager")
    ratios: Any = model.hidrop_ratios
    torch.testing.assert_close(
        ratios.values.detach(), torch.tensor([0.4, 0.5]), rtol=0.05, atol=0.02
    )


def test_tools_tell_what_they_can_of_images_of_several_sizes(pruned_pixtral: Any) -> None:
    model = pruned_pixtral
    inputs = sized_batch(model, MIXED)
    assert hidrop.plan(PRUNED, model).total_vision_tokens == 64
    explained = hidrop.explain(model, **inputs)
    assert [row.vision_tokens for row in explained.rows] == [6, 11, 0]
    hidrop.inspect(model)
    with torch.no_grad():
        model(**inputs)
    report = hidrop.inspect(model)
    assert report.vision_tokens == (6, 11, 0)
    assert report.images == (1, 2, 0)
    assert hidrop.compare(model, **inputs).ok


class Processor:
    image_mean = image_std = (0.5, 0.5, 0.5)


def test_heat_maps_have_each_image_in_its_own_size(pruned_pixtral: Any) -> None:
    inputs = sized_batch(pruned_pixtral, MIXED)
    pictures = hidrop.heatmap(pruned_pixtral, inputs, Processor, size=60)
    assert len(pictures) == 3
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    wide, tall, flat = pictures
    assert (
        tall.height - wide.height == 60 - 40
    )  # 4 x 2 and 2 x 3 patches, the longer side 60 pixels
    assert wide.height - flat.height == 40 - 20
