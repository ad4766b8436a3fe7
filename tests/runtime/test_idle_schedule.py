"""A schedule that has no effect on a batch with images says why, once for each reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from tests.support.models import IMAGE, IMAGE_TOKEN, PRUNED, batch, tiny_llava

ROWS = [[5, 6, IMAGE, 7, 8], [9, IMAGE, 10]]
Inputs = dict[str, Any]


pytestmark = pytest.mark.usefixtures("one_capture_a_model")
Compiled = Callable[..., Any]


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    """By vision tokens of an image."""
    return {tokens: tiny_llava(image_tokens=tokens) for tokens in (1, 9)}


@pytest.fixture
def compiled(models: dict[int, Any]) -> Iterator[Compiled]:
    """`compiled(PRUNED, image_tokens=1)`: a model under a schedule, for the length of a test."""

    def make(schedule: str = PRUNED, image_tokens: int = 9, **options: Any) -> Any:
        return hidrop.compile(models[image_tokens], schedule, backend="eager", **options)

    yield make
    for model in models.values():
        if hidrop.is_compiled(model):
            hidrop.restore(model)
        model.eval()


def embedded_images(model: Any) -> Inputs:
    """Embeddings with the image features in their places already."""
    inputs = batch(model, ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    places = inputs.pop("input_ids") == IMAGE_TOKEN
    inputs.pop("pixel_values")
    return inputs | {"inputs_embeds": embeds.masked_fill(places[..., None], 0.5)}


def hidden_by_mask(model: Any) -> Inputs:
    inputs = batch(model, ROWS)
    inputs["attention_mask"][inputs["input_ids"] == IMAGE_TOKEN] = 0
    return inputs


def all_supervised(model: Any) -> Inputs:
    inputs = batch(model, ROWS)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def images_supervised(model: Any) -> Inputs:
    """Labels on image places and behind them alone."""
    inputs = batch(model, ROWS)
    ids = inputs["input_ids"]
    near = (ids == IMAGE_TOKEN) | (ids.roll(1, dims=1) == IMAGE_TOKEN)
    return inputs | {"labels": ids.masked_fill(~near, -100)}


def shifted_labels(model: Any) -> Inputs:
    inputs = all_supervised(model)
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    return inputs | {"shift_labels": shifted, "use_cache": False}


def image_last(model: Any) -> Inputs:
    return batch(model, [[5, 6, IMAGE]])


def no_features(model: Any) -> Inputs:
    encoded = SimpleNamespace(pooler_output=[torch.zeros(0, 32), torch.zeros(0, 32)])
    return {"input_ids": torch.tensor([[5, 6, 7]]), "mm_encoder_outputs": {"image": encoded}}


def with_images(model: Any) -> Inputs:
    return batch(model, ROWS)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], Inputs], str]] = {
    "embeddings of images": (PRUNED, {}, embedded_images, "inputs_embeds without a placeholder"),
    "hidden by the mask": (PRUNED, {}, hidden_by_mask, "attention_mask hides every image place"),
    "all supervised": (PRUNED, {}, all_supervised, "labels supervise what every image place"),
    "images supervised": (PRUNED, {}, images_supervised, "labels supervise what every image place"),
    "shifted labels": (PRUNED, {}, shifted_labels, "labels supervise what every image place"),
    "the image ends the prompt": (PRUNED, {"image_tokens": 1}, image_last, "ends with its image"),
    "no features": (PRUNED, {}, no_features, "have no features"),
    "counts above what there is": ("prune=1:99+2:50", {}, with_images, "keeps every vision token"),
    "a fraction of one": ("prune=1:1.0", {}, with_images, "keeps every vision token"),
    "ratios that drop nothing": (
        "prune=1:9,selection=dtopk", {}, with_images, "learned ratios keep every vision token",
    ),
    "an exit behind the last layer": ("exit=4", {}, with_images, "does nothing in 4 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_reason_is_logged_once(
    compiled: Compiled, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    schedule, options, make, reason = CASES[case]
    model = compiled(schedule, **options).train("supervised" in case or "labels" in case)
    caplog.clear()
    for _ in range(2):
        model(**make(model))
    lines = [r for r in caplog.records if reason in r.getMessage()]
    assert len(lines) == 1, caplog.text
    assert lines[0].levelname == "WARNING"
    others = [r for r in caplog.records if "finds no vision" in r.getMessage() and r not in lines]
    assert not others


@pytest.mark.parametrize("case", ["all supervised", "no features", "a fraction of one"])
def test_a_graph_runner_says_it_too(
    compiled: Compiled, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    schedule, options, make, reason = CASES[case]
    model = compiled(schedule, cuda_graphs=True, **options)
    with torch.no_grad():
        model(**make(model))
    assert caplog.text.count(reason) == 1


def text_alone(model: Any) -> Inputs:
    return batch(model, [[5, 6, 7], [8]])


def one_row_supervised(model: Any) -> Inputs:
    inputs = all_supervised(model)
    inputs["labels"][0] = -100
    return inputs


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (PRUNED, with_images),
        (PRUNED, text_alone),
        (PRUNED, one_row_supervised),
        ("prune=1:8", with_images),
        ("inject=1", with_images),
        ("exit=3", with_images),
        ("positions=group", with_images),
        ("prune=1:99,exit=3", with_images),
        ("identity", all_supervised),
        ("identity", embedded_images),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_a_schedule_with_an_effect_says_nothing(
    compiled: Compiled,
    schedule: str,
    make: Callable[[Any], Inputs],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = compiled(schedule)
    caplog.clear()
    model(**make(model))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("schedule", ["reads=0+2", "bottleneck=8"])
def test_a_schedule_that_hides_vision_tokens_is_not_idle(
    compiled: Compiled, caplog: pytest.LogCaptureFixture, schedule: str
) -> None:
    model = compiled(schedule)
    with torch.no_grad():
        model(**batch(model, [[5, IMAGE, 8, 6]]))
    assert "does nothing" not in caplog.text


def test_placeholders_behind_a_cache_are_words(
    compiled: Compiled, caplog: pytest.LogCaptureFixture
) -> None:
    model = compiled()
    with torch.no_grad():
        for _ in range(2):
            cache = model(**batch(model, [[5, IMAGE, 6]])).past_key_values
            new: Tensor = torch.tensor([[7, IMAGE_TOKEN, 8]])
            model(input_ids=new, past_key_values=cache)
    assert caplog.text.count("placeholder tokens behind a prompt's cache are words") == 1


def test_a_generated_placeholder_is_no_reason(
    compiled: Compiled, caplog: pytest.LogCaptureFixture
) -> None:
    model = compiled()
    with torch.no_grad():
        cache = model(**batch(model, [[5, IMAGE, 6]])).past_key_values
        model(input_ids=torch.tensor([[IMAGE_TOKEN]]), past_key_values=cache)
    assert "are words" not in caplog.text
