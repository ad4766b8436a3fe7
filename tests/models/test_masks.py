"""Classes whose masks are not causal alone, in the calls that the tests of every class do not make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from tests.support import counter
from tests.support.families import CASES, IMAGE, ROWS, VIDEO, make_batch
from tests.support.families.case import IMAGE_TOKEN
from tests.support.families.reference import FamilyReference
from tests.support.runtimes import compiled_eagerly

SCHEDULE = hidrop.Schedule(inject=1, prune={1: 3, 2: 0.5})
NAMES = ("gemma3", "paligemma2")
pytestmark = pytest.mark.usefixtures("one_capture_a_model")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: CASES[name].make() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_token_types_the_masks_are_causal_as_hugging_faces(
    name: str, models: dict[str, Any]
) -> None:
    model = models[name]
    inputs = make_batch(CASES[name], model, ROWS).inputs
    types = inputs.pop("token_type_ids")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    whole = model(**inputs, token_type_ids=types).logits[real]
    assert (expected - whole).abs().max() > 0.1
    with compiled_eagerly(model, hidrop.Schedule()):
        found = model(**inputs).logits[real]
        again = model(**inputs, token_type_ids=types).logits[real]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(again, whole, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_images_without_a_word_between_are_one_block(models: dict[str, Any]) -> None:
    model = models["gemma3"]
    inputs = make_batch(
        CASES["gemma3"], model, [[5, IMAGE, IMAGE, 6, 7], [IMAGE, 3, IMAGE, 8]]
    ).inputs
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    with compiled_eagerly(model, hidrop.Schedule()):
        found = model(**inputs).logits[real]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_token_types_of_another_length_are_refused(name: str, models: dict[str, Any]) -> None:
    model = models[name]
    inputs = make_batch(CASES[name], model, ROWS).inputs
    short = inputs["token_type_ids"][:, 1:]
    with (
        compiled_eagerly(model, SCHEDULE),
        pytest.raises(
            hidrop.InputError, match=r"token_type_ids has shape \(3, \d+\); it must be that of"
        ),
    ):
        model(**(inputs | {"token_type_ids": short}))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_warm_up_makes_the_program_that_real_prompts_run(
    name: str, models: dict[str, Any]
) -> None:
    model = models[name]
    inputs = make_batch(CASES[name], model, ROWS[:1]).inputs
    with compiled_eagerly(model, SCHEDULE):
        tokens = int((inputs["input_ids"] == IMAGE_TOKEN).sum())
        hidrop.warmup(
            model,
            [hidrop.Shape(text=8, images=1, image_tokens=tokens, new_tokens=3)],
            progress=False,
        )
        with counter.expect(captures=0, programs=0):
            model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "masks in which tokens see each other both ways"),
        ("molmo2", "each other both ways and features that are added to embeddings"),
        ("qwen3_vl", "features that are added in its layers"),
        ("ovis2", "text embeddings of its own"),
    ],
)
def test_calibration_of_what_the_decoder_alone_does_not_do_is_refused(
    name: str, reason: str
) -> None:
    model = CASES[name].make()
    inputs = make_batch(CASES[name], model, ROWS).inputs
    with pytest.raises(hidrop.HidropError, match=f"cannot be calibrated: it has .*{reason}"):
        hidrop.calibrate(model, [inputs], progress=False)


def test_molmo_2_is_trained_with_the_types_of_its_tokens_alone(models: dict[str, Any]) -> None:
    model = CASES["molmo2"].make()
    inputs = make_batch(CASES["molmo2"], model, ROWS).inputs
    types = inputs.pop("mm_token_type_ids")
    model.train()
    with pytest.raises(ValueError, match="`mm_token_type_ids` is required"):
        model(**inputs)
    with compiled_eagerly(model, SCHEDULE):
        with pytest.raises(hidrop.InputError, match="is trained with mm_token_type_ids"):
            model(**inputs, labels=inputs["input_ids"] * types - 100 * (1 - types))
        model.eval()
        with torch.no_grad():
            model(**inputs)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size_per_layer_input": 4}, "hidden_size_per_layer_input=4"),
        ({"num_kv_shared_layers": 1}, "its last 1 layers read the keys and values"),
        ({"use_bidirectional_attention": "all"}, "all its tokens see each other both ways"),
    ],
)
def test_a_gemma_4_with_more_in_its_layers_is_refused(changes: dict[str, Any], reason: str) -> None:
    model = CASES["gemma4"].make()
    for name, value in changes.items():
        setattr(model.config.text_config, name, value)
    with pytest.raises(hidrop.HidropError, match=f"this Gemma 4 cannot be scheduled: .*{reason}"):
        hidrop.compile(model, SCHEDULE, backend="eager")
    assert not hidrop.is_compiled(model)


@torch.no_grad()
def test_a_gemma_4_without_blocks_is_causal(models: dict[str, Any]) -> None:
    case = CASES["gemma4"]
    model = case.make()
    model.config.text_config.use_bidirectional_attention = None
    inputs = make_batch(case, model, ROWS).inputs
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    with compiled_eagerly(model, hidrop.Schedule()):
        found = model(**inputs).logits[real]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_recorded_prompt_serves_other_blocks_of_its_lengths(models: dict[str, Any]) -> None:
    case, model = CASES["gemma3"], models["gemma3"]
    prompts: list[list[list[int | str]]] = [
        [[5, 6, IMAGE, 7, 8, 9]],
        [[5, 6, 7, IMAGE, 8, 9]],
        [[IMAGE, 5, 6, 7, 8, 9]],
    ]
    batches = [make_batch(case, model, rows).inputs for rows in prompts]
    reference = FamilyReference(model, SCHEDULE, case)
    hidrop.compile(model, SCHEDULE, backend="eager", cuda_graphs=True)
    try:
        for rows, inputs in zip(prompts, batches, strict=True):
            (row,) = make_batch(case, model, rows).rows
            found = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
            wanted, _ = reference.generate(row, reference.embeds(row), 3)
            assert found[0, -3:].tolist() == wanted
    finally:
        hidrop.restore(model)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prompt_lookup_is_hugging_faces(name: str, models: dict[str, Any]) -> None:
    model = models[name]
    inputs = make_batch(CASES[name], model, [[3, IMAGE, 5, 6, 7, 8, 5, 6, 7]]).inputs
    how = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "prompt_lookup_num_tokens": 2,
    }
    expected = model.generate(**inputs, **how)
    with compiled_eagerly(model, hidrop.Schedule()):
        assert model.generate(**inputs, **how).tolist() == expected.tolist()


@torch.no_grad()
def test_dumped_stages_replay(tmp_path: Path, models: dict[str, Any]) -> None:
    case, model = CASES["gemma3"], models["gemma3"]
    inputs = make_batch(case, model, ROWS).inputs
    with compiled_eagerly(model, SCHEDULE):
        model(**inputs, use_cache=True)
        hidrop.dump(model, tmp_path)
        assert hidrop.replay(tmp_path, model, **inputs).ok


@torch.no_grad()
def test_frames_of_molmo_2_are_causal() -> None:
    case = CASES["molmo2"]
    model = case.make()
    batch = make_batch(case, model, [[5, VIDEO, 6, 7], [8, 9, VIDEO, 10]])
    whole = model(**batch.inputs).logits
    with compiled_eagerly(model, hidrop.Schedule()):
        found = model(**batch.inputs).logits
    for b, row in enumerate(batch.rows):
        torch.testing.assert_close(
            found[b, row.columns], whole[b, row.columns], atol=2e-4, rtol=2e-4
        )
    reference = FamilyReference(model, SCHEDULE, case)
    with compiled_eagerly(model, SCHEDULE):
        found = model(**batch.inputs).logits
    for b, row in enumerate(batch.rows):
        wanted = reference.run(row, reference.embeds(row))
        at = row.columns[wanted.columns]
        torch.testing.assert_close(found[b, at], wanted.logits, atol=3e-4, rtol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_on_inductor_as_in_eager_mode(name: str) -> None:
    case = CASES[name]
    model = case.make()
    batch = make_batch(case, model, ROWS)
    reference = FamilyReference(model, SCHEDULE, case)
    hidrop.compile(model, SCHEDULE)
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        tokens = model.generate(
            **batch.inputs, max_new_tokens=3, do_sample=False, eos_token_id=None
        )
    for b, row in enumerate(batch.rows):
        wanted = reference.run(row, reference.embeds(row))
        torch.testing.assert_close(
            logits[b, row.columns][wanted.columns], wanted.logits, atol=1e-3, rtol=1e-3
        )
        expected, _ = reference.generate(row, reference.embeds(row), 3)
        assert tokens[b, batch.inputs["input_ids"].shape[1] :].tolist() == expected
    assert not hidrop.inspect(model).fallbacks
    hidrop.restore(model)
