"""Features that a decoder adds to its vision tokens between the layers, under every kind of event."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.models import family_of
from tests.support.families import CASES, IMAGE, ROWS, VIDEO, Batch, Case, make_batch
from tests.support.families.reference import IGNORE as IGNORED
from tests.support.families.reference import FamilyReference
from tests.support.generation import KEEPS_IMAGES_TOGETHER
from tests.support.runtimes import compiled_eagerly

pytestmark = pytest.mark.usefixtures("one_capture_a_model")

MISSED = hidrop.Schedule(inject=2, prune={2: 2})
SKIPPED = hidrop.Schedule(inject=2, prune={2: 2}, deepstack="skip")
THERE = hidrop.Schedule(prune={1: 2, 2: 1}, deepstack="skip")
GONE = hidrop.Schedule(inject=0, exit=1)
SCHEDULES = (MISSED, SKIPPED, THERE, GONE)
NAMES = ("qwen3_vl", "granite4_vision")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def model(case: Case, models: dict[str, Any]) -> Iterator[Any]:
    if case.name not in models:
        models[case.name] = case.make()
    yield models[case.name]
    assert not hidrop.is_compiled(models[case.name])
    models[case.name].eval()


def reference_of(case: Case, model: Any, schedule: Any) -> FamilyReference:
    return FamilyReference(model, schedule, case)


def check(case: Case, model: Any, schedule: Any, batch: Batch, logits: Tensor) -> None:
    reference = reference_of(case, model, schedule)
    for b, row in enumerate(batch.rows):
        wanted = reference.run(row, reference.embeds(row))
        found = logits[b, row.columns][wanted.columns]
        torch.testing.assert_close(found, wanted.logits, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@torch.no_grad()
def test_additions_follow_the_tokens(case: Case, model: Any, schedule: Any) -> None:
    if case.name == "granite4_vision" and schedule == SKIPPED:
        with pytest.raises(hidrop.ScheduleError, match="an image of this model is what is added"):
            hidrop.compile(model, schedule, backend="eager")
        return
    with compiled_eagerly(model, schedule):
        for padding in ("left", "right"):
            batch = make_batch(case, model, ROWS, padding)
            check(case, model, schedule, batch, model(**batch.inputs).logits)


@torch.no_grad()
def test_what_a_late_token_missed_is_a_word_of_the_schedule(models: dict[str, Any]) -> None:
    case = CASES["qwen3_vl"]
    model = models.setdefault("qwen3_vl", case.make())
    inputs = make_batch(case, model, ROWS).inputs
    found = []
    for schedule in (MISSED, SKIPPED):
        with compiled_eagerly(model, schedule):
            found.append(model(**inputs).logits[:, -1])
    assert float((found[0] - found[1]).abs().max()) > 1e-2
    torch.testing.assert_close(found[0][2], found[1][2])  # a row without images


@pytest.mark.parametrize("schedule", [hidrop.Schedule(), MISSED, GONE], ids=str)
@torch.no_grad()
def test_vision_places_of_the_text_stream_get_theirs(case: Case, model: Any, schedule: Any) -> None:
    """A prompt that ends with its image."""
    batch = make_batch(case, model, [[5, 6, IMAGE], [7, 8, 9, IMAGE]])
    expected = model(**batch.inputs).logits
    with compiled_eagerly(model, schedule):
        logits = model(**batch.inputs).logits
    check(case, model, schedule, batch, logits)
    if schedule.identity:
        for b, row in enumerate(batch.rows):
            torch.testing.assert_close(
                logits[b, row.columns], expected[b, row.columns], atol=3e-4, rtol=3e-4
            )


@torch.no_grad()
def test_the_states_between_the_layers_are_hugging_face_s(case: Case, model: Any) -> None:
    inputs = make_batch(case, model, [ROWS[0]]).inputs
    expected = model(**inputs, output_hidden_states=True).hidden_states
    with compiled_eagerly(model, hidrop.Schedule()):
        found = model(**inputs, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=3e-4)


@torch.no_grad()
def test_text_alone(case: Case, model: Any) -> None:
    inputs = make_batch(case, model, [[5, 6, 7], [8, 9, 10]]).inputs
    expected = model(**inputs).logits
    with compiled_eagerly(model, MISSED):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=3e-4, rtol=3e-4)


def test_supervised_vision_places(case: Case, model: Any) -> None:
    """What such a place predicts is wanted, so that it belongs to the text stream."""
    batch = make_batch(case, model, ROWS, "right")
    ids = batch.inputs["input_ids"]
    labels = torch.where(batch.inputs["attention_mask"] == 1, ids, IGNORED)
    labels[0, 0] = IGNORED
    model.train()
    model(**batch.inputs, labels=labels).loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with compiled_eagerly(model, MISSED):
        model(**batch.inputs, labels=labels).loss.backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-3, rtol=1e-3)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_told_compared_and_replayed(case: Case, model: Any, tmp_path: Path) -> None:
    inputs = make_batch(case, model, ROWS).inputs
    with compiled_eagerly(model, MISSED):
        assert hidrop.compare(model, new_tokens=2, **inputs).ok
        assert "as they enter at layer 2, those of layer" in str(hidrop.explain(model, **inputs))
        model(**inputs)
        assert "deepstack features join vision tokens" in str(hidrop.inspect(model))
        hidrop.dump(model, tmp_path)
        held = hidrop.replay(tmp_path, model, **inputs)
    assert held.ok, str(held)


@pytest.mark.skipif(
    not KEEPS_IMAGES_TOGETHER, reason="transformers before 5.23 mixes up rows of several images"
)
@torch.no_grad()
def test_beams_and_what_was_encoded_before(case: Case, model: Any) -> None:
    # The class's own copies of a row mix up its images: `test_family_calls` has those.
    second = [8, IMAGE, 9, 10, 11] if case.name == "granite4_vision" else ROWS[1]
    inputs = make_batch(case, model, [ROWS[0], second]).inputs

    def beams() -> Any:
        return model.generate(
            **dict(inputs), max_new_tokens=3, do_sample=False, num_beams=2, eos_token_id=None
        ).tolist()

    expected = beams()
    with compiled_eagerly(model, hidrop.Schedule()):
        assert beams() == expected


@torch.no_grad()
def test_saved_and_loaded(models: dict[str, Any], tmp_path: Path) -> None:
    case = CASES["qwen3_vl"]
    model = models.setdefault("qwen3_vl", case.make())
    inputs = make_batch(case, model, [ROWS[0], [5, VIDEO, 6, IMAGE, 7]]).inputs
    with compiled_eagerly(model, SKIPPED):
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    hidrop.load(again, tmp_path, backend="eager")
    torch.testing.assert_close(again(**inputs).logits, expected)


@pytest.mark.parametrize("positions", ["compact", "group"])
def test_rules_that_renumber_are_refused(models: dict[str, Any], positions: str) -> None:
    model = models.setdefault("qwen3_vl", CASES["qwen3_vl"].make())
    with pytest.raises(hidrop.ScheduleError, match=r"3 axes .*use positions='persistent'"):
        hidrop.compile(model, hidrop.Schedule(prune={1: 2}, positions=positions))


@torch.no_grad()
def test_recorded_and_warmed_up(case: Case, model: Any) -> None:
    inputs = make_batch(case, model, ROWS).inputs
    with compiled_eagerly(model, MISSED):
        expected = model(**inputs).logits
    hidrop.compile(model, MISSED, backend="eager", cuda_graphs=True, overlap_vision=True)
    try:
        hidrop.warmup(model, [hidrop.Shape(text=6, images=1, image_tokens=4, new_tokens=2)])
        torch.testing.assert_close(model(**inputs).logits, expected)
        encoded = model.model.get_image_features(
            **{k: v for k, v in inputs.items() if k.startswith(("pixel", "image_"))},
            return_dict=True,
        )
        encoded.deepstack_features = None
        bare = {k: v for k, v in inputs.items() if k != "pixel_values"}
        with pytest.raises(hidrop.InputError, match=r"has deepstack_features, and the .* has none"):
            model(**bare, mm_encoder_outputs={"image": encoded})
    finally:
        hidrop.restore(model)


def test_the_text_form() -> None:
    assert hidrop.Schedule.parse(str(SKIPPED)) == SKIPPED
    assert hidrop.Schedule.from_json(SKIPPED.to_json()) == SKIPPED
    assert "deepstack" not in str(MISSED)
    with pytest.raises(
        hidrop.ScheduleError, match="deepstack='later'; use one of 'at_inject', 'skip'"
    ):
        hidrop.Schedule(deepstack="later")


def test_features_of_all_images_in_one_piece_are_those_of_each() -> None:
    """So they are before transformers 5.23."""
    case = CASES["qwen3_vl"]
    model = case.make()
    pixels = case.images(model, [2, 1])
    found = family_of(model).deepstack
    assert found is not None
    output = model.model.get_image_features(**pixels, return_dict=True)
    lengths = [len(entry) for entry in output.pooler_output]
    assert len(lengths) == 3
    split = [
        layer.split(lengths) if isinstance(layer, Tensor) else layer
        for layer in output.deepstack_features
    ]
    output.deepstack_features = [torch.cat(entries) for entries in split]
    for layer, entries in zip(found.features(model.config, output), split, strict=True):
        assert [len(entry) for entry in layer] == [len(entry) for entry in entries]
        assert all(torch.equal(one, other) for one, other in zip(layer, entries, strict=True))
