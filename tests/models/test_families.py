"""Every class of HF's that compiles: equal to HF under the identity, and to the reference under a schedule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.models import family_of
from tests.support.families import CASES, IMAGE, ROWS, VIDEO, Batch, Case, make_batch
from tests.support.families.reference import FamilyReference
from tests.support.generation import KEEPS_IMAGES_TOGETHER
from tests.support.runtimes import compiled_eagerly, last_layout

DEFAULT = ("llava_next_video", "idefics3", "qwen2_5_vl", "gemma3")
"""Classes that the default run tries."""
SCHEDULE = hidrop.Schedule(inject=1, prune={1: 3, 2: 0.2}, exit=None)
LEAVING = hidrop.Schedule(inject=0, prune={1: 2}, exit=2)
NEW_TOKENS = 4
pytestmark = pytest.mark.usefixtures("one_capture_a_model")
AMBIGUOUS = 1e-5

each_class = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=name,
            marks=[
                pytest.mark.xdist_group(f"family_{name}"),
                *([] if name in DEFAULT else [pytest.mark.families]),
            ],
        )
        for name, case in CASES.items()
    ],
)


@pytest.fixture(scope="module")
def _models() -> dict[str, Any]:
    return {}


@pytest.fixture
def model(case: Case, _models: dict[str, Any]) -> Iterator[Any]:
    if case.name not in _models:
        try:
            _models[case.name] = case.make()
        except AttributeError as error:
            if KEEPS_IMAGES_TOGETHER or "transformers has no attribute" not in str(error):
                raise
            pytest.skip(f"an older transformers: {error}")
    found = _models[case.name]
    yield found
    assert not hidrop.is_compiled(found)
    found.zero_grad(set_to_none=True)
    found.eval()


def rows_of(case: Case) -> list[Any]:
    if case.videos is None or case.one_kind:
        return list(ROWS)
    return [*ROWS, [16, VIDEO, 17, 18, IMAGE, 19, 20]]


def row_sets(case: Case) -> list[list[Any]]:
    """Rows of calls: one, or two where images and videos cannot be in one call."""
    alone = [[5, VIDEO, 6, 7], [8, VIDEO, 9, 10, VIDEO, 11], [13, 14, 15]]
    return [rows_of(case), *([alone] if case.one_kind and case.videos else [])]


def generated(model: Any, batch: Batch) -> list[list[int]]:
    inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[:, batch.inputs["input_ids"].shape[1] :].tolist()


def at_rows(batch: Batch, logits: Tensor) -> list[Tensor]:
    return [logits[b, row.columns] for b, row in enumerate(batch.rows)]


def labelled(batch: Batch) -> Tensor:
    """Two spans of labels a row, on words."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    labels = torch.full_like(ids, -100)
    for b, row in enumerate(batch.rows):
        words = [c for c, v in zip(row.columns.tolist(), row.vision.tolist(), strict=True) if not v]
        for column in (*words[-2:], words[1]):
            labels[b, column] = ids[b, column]
    assert bool(((labels == -100) | (mask == 1)).all())
    return labels


@each_class
@torch.no_grad()
def test_the_identity_is_hugging_face(case: Case, model: Any) -> None:
    batches = [
        make_batch(case, model, rows, padding)
        for rows in row_sets(case)
        for padding in ("left", "right")
    ]
    expected = [at_rows(batch, model(**batch.inputs).logits) for batch in batches]
    tokens = generated(model, batches[0])
    with compiled_eagerly(model, hidrop.Schedule()):
        for batch, logits in zip(batches, expected, strict=True):
            for found, wanted in zip(
                at_rows(batch, model(**batch.inputs).logits), logits, strict=True
            ):
                torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
        assert generated(model, batches[0]) == tokens


def refused_by_hugging_face(model: Any, inputs: dict[str, Any]) -> bool:
    try:
        model(**inputs)
    except Exception:
        return True
    return False


@each_class
@torch.no_grad()
def test_a_call_that_does_not_fit_is_refused(case: Case, model: Any) -> None:
    """A place that was typed or lost, no pixels, and each argument without which Hugging Face's encoder fails."""
    rows: dict[str, list[Any]] = {"image": [list(row) for row in ROWS[:2]]}
    if case.videos is not None:
        rows["video"] = [[5, VIDEO, 6, 7], [8, VIDEO, 9, 10, VIDEO, 11]]
    for kind, prompts in rows.items():
        inputs = make_batch(case, model, prompts).inputs
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
        modality = family_of(model).modality(kind)
        assert modality is not None
        places = inputs["input_ids"] == modality.token(model.config)
        typed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        typed["input_ids"][0, -1] = modality.token(model.config)
        lost = {**inputs, "input_ids": inputs["input_ids"].clone()}
        lost["input_ids"][1, places[1].nonzero()[-1]] = 7
        wordless = {k: v for k, v in inputs.items() if k not in modality.inputs}
        without = {
            name: {k: v for k, v in inputs.items() if k != name}
            for name in modality.inputs[1:]
            if name in inputs
        }
        needed = {n: g for n, g in without.items() if refused_by_hugging_face(model, g)}
        one = r"(image|video)" if case.same_token else kind
        with compiled_eagerly(model, hidrop.Schedule()):
            for given in (typed, lost):
                with pytest.raises(
                    hidrop.InputError, match=rf"{one} placeholder tokens.* features"
                ):
                    model(**given)
            with pytest.raises(hidrop.InputError, match=rf"row 0 has \d+ {one} placeholder tokens"):
                model(**wordless)
            for name, given in needed.items():
                with pytest.raises(
                    hidrop.InputError, match=rf"{name}|{one} placeholder tokens.* features"
                ):
                    model(**given)


@each_class
@pytest.mark.parametrize("schedule", [SCHEDULE, LEAVING], ids=str)
@torch.no_grad()
def test_a_schedule_is_the_reference(case: Case, model: Any, schedule: Any) -> None:
    reference = FamilyReference(model, schedule, case)
    with compiled_eagerly(model, schedule):
        for rows, padding in itertools.product(row_sets(case), ("left", "right")):
            batch = make_batch(case, model, rows, padding)
            logits = model(**batch.inputs).logits
            layout = last_layout(model)
            assert layout.images == [row.items for row in batch.rows]
            for found, row in zip(at_rows(batch, logits), batch.rows, strict=True):
                wanted = reference.run(row, reference.embeds(row))
                assert wanted.gap > AMBIGUOUS
                torch.testing.assert_close(
                    found[wanted.columns], wanted.logits, atol=3e-4, rtol=3e-4
                )
        batch = make_batch(case, model, row_sets(case)[-1], "left")
        found_tokens = generated(model, batch)
    for tokens, row in zip(found_tokens, batch.rows, strict=True):
        expected, margin = reference.generate(row, reference.embeds(row), NEW_TOKENS)
        if margin > AMBIGUOUS:
            assert tokens == expected


@each_class
@torch.no_grad()
def test_saved_and_loaded_it_answers_alike(case: Case, model: Any, tmp_path: Path) -> None:
    """Weights, configuration and schedule: `save_pretrained`, `from_pretrained`, `hidrop.load`."""
    inputs = make_batch(case, model, rows_of(case)).inputs
    with compiled_eagerly(model, SCHEDULE):
        wanted = model(**inputs).logits
        model.save_pretrained(tmp_path)
    hidrop.load(model, tmp_path, backend="eager")
    found = model(**inputs).logits
    hidrop.restore(model)
    torch.testing.assert_close(found, wanted)
    again = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=bool(case.resized))
    hidrop.load(again, tmp_path, backend="eager")
    assert hidrop.schedules(again) == {"default": SCHEDULE}
    read, written = (m.config.get_text_config().to_dict() for m in (again, model))
    assert {**read, "dtype": None} == {**written, "dtype": None}
    weights = (dict(m.state_dict()) for m in (again, model))
    held = [{n: w for n, w in found.items() if n not in case.resized} for found in weights]
    torch.testing.assert_close(*held, rtol=0, atol=0)


@each_class
def test_a_training_step_is_the_reference(case: Case, model: Any) -> None:
    batch = make_batch(case, model, rows_of(case), "right")
    labels = labelled(batch)
    model.train()
    for schedule in (hidrop.Schedule(), SCHEDULE):
        reference = FamilyReference(model, schedule, case)
        model.zero_grad(set_to_none=True)
        fresh = make_batch(case, model, rows_of(case), "right")
        total, count = torch.zeros(()), 0
        for b, row in enumerate(fresh.rows):
            own = labels[b, row.columns]
            found = reference.run(row, reference.embeds(row), labels=own)
            targets = {c: int(own[c + 1]) for c in range(len(own) - 1) if int(own[c + 1]) != -100}
            at = [found.columns.index(c) for c in targets]
            total = total + torch.nn.functional.cross_entropy(
                found.logits[at], torch.tensor(list(targets.values())), reduction="sum"
            )
            count += len(targets)
        (total / count).backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        with compiled_eagerly(model, schedule):
            loss = model(**batch.inputs, labels=labels).loss
            loss.backward()
        torch.testing.assert_close(loss, total.detach() / count, atol=1e-4, rtol=1e-4)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(got) == set(wanted)
        for name, gradient in wanted.items():
            torch.testing.assert_close(
                got[name], gradient, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
