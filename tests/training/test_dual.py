"""Training under two schedules in turn: loss and gradients of a loop written out with Hugging Face's model and the eager reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import schedules_of
from tests.support import counter
from tests.support.gradients import gradients
from tests.support.models import IGNORE, IMAGE, PRUNED, batch, random_labels, tiny_llava
from tests.support.reference import reference_logits
from tests.support.trainers import DATA, collate, options

ROWS: list[list[int | str]] = [[5, 6, IMAGE, 7, 8, 9], [4, 5, 6, 7], [IMAGE, 5, IMAGE, 12, 13]]
NAMED = {"fast": PRUNED, "full": hidrop.Schedule()}
KINDS = ["fast", "full", "fast", "fast", "full", "full"]
"""Of the first steps at a share of one half and seed 108."""
EXACT = 1e-5


def compiled(backend: str = "eager", **given: Any) -> Any:
    return hidrop.compile(tiny_llava(**given), NAMED, backend=backend).train()


def plain() -> Any:
    return tiny_llava(attn="eager").train()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    found: dict[str, Any] = batch(tiny_llava(num_layers=1), ROWS, padding="left")
    labels = random_labels(found, seed=1, spans=3)
    first = found["attention_mask"].argmax(dim=1, keepdim=True)
    labels.scatter_(1, first, IGNORE)  # Hugging Face lets a pad predict it
    return found | {"labels": labels}


def dual(**given: Any) -> Any:
    return hidrop.DualTraining(**({"share": 0.5, "seed": 108} | given))


def only(kind: str, distill: str | None, **given: Any) -> Any:
    return dual(share=float(kind == "fast"), distill=distill, **given)


# What a step computes, written out.


def logits_under(model: Any, name: str, inputs: dict[str, Any]) -> Tensor:
    """Return logits [answers, V] of the rows that predict one: Hugging Face's own with all tokens, else the reference's."""
    given = {k: v for k, v in inputs.items() if k != "num_items_in_batch"}
    if name == "full":
        found = model(**{k: v for k, v in given.items() if k != "labels"}).logits
    else:
        found = reference_logits(model, hidrop.Schedule.parse(PRUNED), given)
    return found[:, :-1][inputs["labels"][:, 1:] != IGNORE]


def loss_by_hand(
    model: Any,
    kind: str,
    distill: str | None,
    inputs: dict[str, Any],
    weight: float,
    temperature: float,
) -> Tensor:
    student = logits_under(model, kind, inputs)
    answers = inputs["labels"][:, 1:][inputs["labels"][:, 1:] != IGNORE]
    items = inputs.get("num_items_in_batch", len(answers))
    loss = -student.log_softmax(-1)[range(len(answers)), answers].sum() / items
    if distill is None or distill.split("_")[0] != kind:
        return loss
    with torch.no_grad():
        other = "fast" if kind == "full" else "full"
        taught = (logits_under(model, other, inputs) / temperature).softmax(-1)
    learned = (student / temperature).log_softmax(-1)
    divergence = (taught * (taught.log() - learned)).sum()
    return loss + weight * temperature**2 * divergence / items


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=EXACT,
            atol=EXACT * scale + 1e-7,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("items", [None, 17])
@pytest.mark.parametrize("distill", ["full_from_fast", "fast_from_full", None])
@pytest.mark.parametrize("kind", ["fast", "full"])
def test_loss_and_gradients_are_those_of_a_loop_by_hand(
    kind: str, distill: str | None, items: int | None, inputs: dict[str, Any]
) -> None:
    if items is not None:
        inputs = inputs | {"num_items_in_batch": torch.tensor(items)}
    model, twin = compiled(), plain()
    with only(kind, distill, weight=0.7, temperature=2.0).step(model, 0) as found:
        assert found == kind
        loss = model(**inputs).loss
    loss.backward()
    expected = loss_by_hand(twin, kind, distill, inputs, 0.7, 2.0)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
    assert_equal_gradients(gradients(model), gradients(twin))
    assert "model.vision_tower.embeddings.patch_embedding.weight" in gradients(model)


def test_samples_packed_into_a_row_learn_as_in_rows_of_their_own(inputs: dict[str, Any]) -> None:
    real = inputs["attention_mask"].bool()
    packed = {
        "input_ids": inputs["input_ids"][real][None],
        "labels": inputs["labels"][real][None],
        "position_ids": (inputs["attention_mask"].cumsum(1) - 1)[real][None],
        "pixel_values": inputs["pixel_values"],
    }
    losses = []
    for each in (inputs, packed):
        model = compiled()
        with only("full", "full_from_fast", weight=2.0).step(model, 0):
            loss = model(**each).loss
        loss.backward()
        losses.append((loss.detach(), gradients(model)))
    (expected, wanted), (found, own) = losses
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=0)
    assert_equal_gradients(own, wanted)


def test_parts_are_means_over_the_tokens_of_answers(inputs: dict[str, Any]) -> None:
    model, training = compiled(), only("full", "full_from_fast", weight=3.0, temperature=2.0)
    half = {k: v[:2] for k, v in inputs.items() if k != "pixel_values"}
    halves = [half | {"pixel_values": inputs["pixel_values"][:1]}]
    rest = {k: v[2:] for k, v in inputs.items() if k != "pixel_values"}
    halves.append(rest | {"pixel_values": inputs["pixel_values"][1:]})
    items = (inputs["labels"] != IGNORE).sum()
    with training.step(model, 0):
        for each in halves:
            model(**each, num_items_in_batch=items)
    found = training.parts()
    with torch.no_grad():
        twin = plain()
        alone = loss_by_hand(twin, "full", None, inputs, 0, 1)
        kl = (loss_by_hand(twin, "full", "full_from_fast", inputs, 1.0, 2.0) - alone) / 4
    assert found == pytest.approx({"loss_full": float(alone), "kl_full": float(kl)}, rel=1e-4)
    assert training.parts() == {}


def test_images_are_encoded_once_for_both_passes(inputs: dict[str, Any]) -> None:
    model, calls = compiled(), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with only("full", "full_from_fast").step(model, 0):
        model(**inputs)
    assert len(calls) == 1


def test_a_schedule_that_reads_the_tower_has_it_run_for_itself(inputs: dict[str, Any]) -> None:
    named = {"fast": "before=pooling(tokens=4)", "full": hidrop.Schedule()}
    model: Any = hidrop.compile(tiny_llava(), named, backend="eager").train()
    losses = {}
    with torch.no_grad():
        losses = {n: float(model(**inputs, hidrop_schedule=n).loss) for n in named}
    for kind in named:
        training = only(kind, f"{kind}_from_{'fast' if kind == 'full' else 'full'}")
        with training.step(model, 0):
            model(**inputs).loss.backward()
        found = training.parts()
        assert found[f"loss_{kind}"] == pytest.approx(losses[kind], rel=1e-5)
        assert found[f"kl_{kind}"] > 0.01


# Which steps.


def test_seed_and_number_decide_the_kind_of_a_step() -> None:
    assert [dual().kind(n) for n in range(6)] == KINDS, "the same on every machine"
    kinds = [hidrop.DualTraining(seed=5).kind(n) for n in range(2000)]
    assert kinds.count("full") == pytest.approx(200, abs=40)
    assert kinds != [hidrop.DualTraining(seed=6).kind(n) for n in range(2000)]
    assert {dual(share=1.0).kind(n) for n in range(50)} == {"fast"}
    assert {dual(share=0.0).kind(n) for n in range(50)} == {"full"}


def test_other_calls_in_a_step_are_as_they_were(inputs: dict[str, Any]) -> None:
    model = compiled()
    with torch.no_grad():
        by_name = {n: float(model(**inputs, hidrop_schedule=n).loss) for n in NAMED}
    with only("full", "full_from_fast").step(model, 0):
        taught = model(**inputs).loss.item()
        assert taught > by_name["full"] + 1e-3
        assert model(**inputs, hidrop_schedule="full").loss.item() == by_name["full"]
        with hidrop.use(model, "fast"):
            assert model(**inputs).loss.item() == by_name["fast"]
        with torch.no_grad():
            assert model(**inputs).loss.item() == by_name["fast"], "the default"
        evaluated = model.eval()(**inputs).loss.item()
        assert evaluated == pytest.approx(by_name["fast"], rel=1e-5)
        copied = copy.deepcopy(model).train()
        assert copied(**inputs).loss.item() == pytest.approx(by_name["fast"], rel=1e-5)
        with pytest.raises(ValueError, match="inner"), dual(share=1.0).step(model, 0):
            raise ValueError("inner")
        assert model.train()(**inputs).loss.item() == pytest.approx(taught, rel=1e-6)
    assert model(**inputs).loss.item() == by_name["fast"]


def test_a_loop_that_forgot_train_mode_is_told(
    inputs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = compiled().eval()
    with caplog.at_level("WARNING", "hidrop_fx"), only("full", "full_from_fast").step(model, 0):
        with torch.no_grad():
            model(**inputs)
        assert not caplog.messages
        model(**inputs)
    assert "is in eval mode: it runs under the default schedule" in caplog.text


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_switching_makes_nothing_anew(backend: str, inputs: dict[str, Any]) -> None:
    model = compiled(backend)
    training = dual()

    def step(number: int) -> None:
        with training.step(model, number):
            model(**inputs).loss.backward()

    with counter.expect(captures=1, programs=2):
        step(0)
        step(1)
    with counter.expect(captures=0, programs=0, compiled=0):
        for number in range(2, 6):
            step(number)
    assert {training.kind(number) for number in range(2, 6)} == {"fast", "full"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.2}, r"share=1\.2 is no share of the steps; pass a number from 0 to 1"),
        ({"distill": "both"}, "distill='both' is none of"),
        ({"temperature": 0}, "temperature=0 divides the logits"),
        ({"temperature": float("inf")}, "temperature=inf divides the logits"),
        ({"weight": float("inf")}, "weight=inf is no weight"),
        ({"share": "0.9"}, r"share='0\.9' is no share"),
        ({"temperature": None}, "temperature=None divides"),
        ({"weight": -1}, r"weight=-1 is no weight; pass a number >= 0, or distill=None"),
    ],
)
def test_values_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(hidrop.HidropError, match=message):
        hidrop.DualTraining(**given)


def test_schedules_that_are_not_there_or_the_same_are_refused(inputs: dict[str, Any]) -> None:
    model = compiled()
    with pytest.raises(hidrop.ScheduleError, match="fast='full' and full='full' are one schedule"):
        dual(fast="full").step(model, 0).__enter__()
    with pytest.raises(hidrop.ScheduleError, match="'slow' is no schedule of this model"):
        dual(full="slow").step(model, 0).__enter__()
    with pytest.raises(hidrop.HidropError, match="not compiled; DualTraining needs two schedules"):
        dual().step(tiny_llava(), 0).__enter__()
    unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
    with dual().step(model, 0):
        for part in (model, model.model):
            with pytest.raises(hidrop.InputError, match=r"step of DualTraining has no labels"):
                part(**unlabelled)
    for number in (None, 2.5, -1):
        with pytest.raises(hidrop.HidropError, match=f"number={number} is no number of an opt"):
            dual().step(model, number).__enter__()
    with dual(distill=None).step(model, 0):
        assert model(**unlabelled).logits.requires_grad


# Trainers.


class Collected:
    """A collator that keeps the batches that it made."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        self.batches.append(collate(examples))
        return self.batches[-1]


def train(
    model: Any, directory: Path, training: Any, resume: bool = False, **changes: Any
) -> tuple[Any, list[dict[str, Any]]]:
    import transformers

    collected = Collected()
    arguments = options(directory, **{"max_steps": 4, "learning_rate": 1e-3} | changes)
    found = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=DATA,
        eval_dataset=DATA[:3],
        data_collator=collected,
        callbacks=[training, hidrop.TrainerCallback()],
    )
    found.train(resume_from_checkpoint=resume)
    return found, collected.batches


def assert_same_parameters(model: Any, other: Any) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_trainer_with_accumulation_gives_what_a_loop_by_hand_gives(tmp_path: Path) -> None:
    model, twin = compiled(), plain()
    training = dual(weight=0.5)
    found, batches = train(
        model, tmp_path, training, gradient_accumulation_steps=2, optim="sgd", max_grad_norm=0.0
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    assert len(batches) == 8 - 2, "the data ends with half a step"
    steps = [batches[0:2], batches[2:3], batches[3:5], batches[5:6]]
    for kind, micro in zip(KINDS, steps, strict=False):
        items = sum((each["labels"][:, 1:] != IGNORE).sum() for each in micro)
        for each in micro:
            given = each | {"num_items_in_batch": items}
            loss_by_hand(twin, kind, "full_from_fast", given, 0.5, 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_parameters(model, twin)
    logged = [line for line in found.state.log_history if "loss" in line]
    assert [set(line) & {"loss_fast", "loss_full", "kl_full", "kl_fast"} for line in logged] == [
        {"loss_fast"} if kind == "fast" else {"loss_full", "kl_full"} for kind in KINDS[:4]
    ]
    for line in logged:
        parts = line.get("loss_fast", 0) or line["loss_full"] + 0.5 * line["kl_full"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    assert schedules_of(model).step is None  # type: ignore[union-attr]


def test_a_resumed_run_takes_the_steps_that_were_to_come(tmp_path: Path) -> None:
    whole, parts = compiled(), compiled()
    kept, _ = train(whole, tmp_path / "whole", dual(), save_steps=2, max_steps=4)
    train(parts, tmp_path / "parts", dual(), save_steps=2, max_steps=2)
    resumed, _ = train(compiled(), tmp_path / "parts", dual(), resume=True, max_steps=4)
    assert_same_parameters(resumed.model, whole)
    full = [[("kl_full" in x) for x in t.state.log_history if "loss" in x] for t in (kept, resumed)]
    assert full[0] == full[1] == [kind == "full" for kind in KINDS[:4]]


def test_a_run_behind_an_interrupted_one_is_its_own(tmp_path: Path) -> None:
    """Trainer tells no callback that it ends by an error: its last step stays."""
    import transformers

    class Interrupts(transformers.TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    losses = []
    for interrupted in (True, False):
        model = compiled()
        if interrupted:
            training = only("full", "full_from_fast", weight=9.0)
            training.on_substep_end = Interrupts().on_substep_end
            with pytest.raises(KeyboardInterrupt):
                train(model, tmp_path, training, gradient_accumulation_steps=2)
            model.zero_grad()
        found, _ = train(model, tmp_path, transformers.TrainerCallback(), max_steps=1)
        losses.append(found.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def sft() -> Callable[..., Any]:
    pytest.importorskip("datasets", reason="datasets, which TRL needs, is not installed")
    pytest.importorskip("trl", reason="trl, which is no dependency, is not installed")
    from tests.training.test_ecosystem import sft as make

    return make


def test_sft_trainers_own_loss_carries_the_lesson(
    sft: Callable[..., Any], tmp_path: Path, inputs: dict[str, Any]
) -> None:
    import trl

    model = compiled()
    trainer = sft(trl, model, tmp_path, "nll", None)
    model.gradient_checkpointing_disable()
    training, items = only("full", "full_from_fast", weight=2.0), torch.tensor(17)
    with training.step(model, 0):
        loss = trainer.compute_loss(model.train(), dict(inputs), num_items_in_batch=items)
    loss.backward()
    twin = plain()
    given = inputs | {"num_items_in_batch": items}
    loss_by_hand(twin, "full", "full_from_fast", given, 2.0, 1.0).backward()
    assert_equal_gradients(gradients(model), gradients(twin))
    alone = loss_by_hand(plain(), "full", None, given, 0, 1)
    torch.testing.assert_close(loss, alone, rtol=EXACT, atol=0, msg="the term has no value here")
    assert training.parts()["kl_full"] > 0.01


def test_a_loss_that_another_library_keeps_to_itself_is_refused(inputs: dict[str, Any]) -> None:
    model = compiled()

    def foreign(input_ids: Any, labels: Any = None, **given: Any) -> Any:
        return model.model(input_ids=input_ids, **given)

    model.forward = foreign
    with only("full", "full_from_fast").step(model, 0):
        for call in (model, model.forward):
            with pytest.raises(hidrop.HidropError, match="computed by another library behind"):
                call(**inputs)
