"""What a schedule learned, on disk: beside the weights, in Trainer's checkpoints, and back again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.training.ratios import Ratios
from hidrop_fx.training.sidecar import RATIOS_FILE, SCHEDULE_FILE
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.runtimes import runtime_in
from tests.support.trainers import DATA, collate, trainer

HARD = "inject=1,prune=1:6+2:3"
DTOPK = HARD + ",selection=dtopk,budget_weight=0.5"
LEARNED = torch.tensor([0.21, 0.57])


def model_with(schedule: str, **options: Any) -> Any:
    return hidrop.compile(tiny_llava(num_layers=3, **options), schedule, backend="eager")


def learned(schedule: str = DTOPK) -> Any:
    model = model_with(schedule)
    model.hidrop_ratios.values.data.copy_(LEARNED)
    return model


def test_save_pretrained_and_load_keep_schedule_and_ratios(tmp_path: Path) -> None:
    model = learned()
    model.save_pretrained(tmp_path)
    assert {SCHEDULE_FILE, RATIOS_FILE, "config.json", "model.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    other = hidrop.load(tiny_llava(num_layers=3, seed=1), tmp_path, backend="eager")
    runtime = runtime_in(other)
    assert runtime.schedule == hidrop.Schedule.parse(DTOPK)
    assert runtime.options.backend == "eager"
    assert torch.equal(other.hidrop_ratios.values, LEARNED)


def test_the_saved_weights_are_those_of_the_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = learned()
    model.save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    plain, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert "hidrop" not in caplog.text
    assert "hidrop" not in (tmp_path / "config.json").read_text()
    for (name, mine), theirs in zip(
        plain.named_parameters(), tiny_llava(num_layers=3).parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_loading_into_a_model_compiled_under_this_schedule_keeps_its_programs(
    tmp_path: Path,
) -> None:
    learned().save_pretrained(tmp_path)
    model = model_with(DTOPK)
    runtime = runtime_of(model)
    assert hidrop.load(model, tmp_path) is model
    assert runtime_of(model) is runtime
    assert torch.equal(model.hidrop_ratios.values, LEARNED)


def test_loading_replaces_another_schedule(tmp_path: Path) -> None:
    model_with(HARD).save_pretrained(tmp_path)
    assert not (tmp_path / RATIOS_FILE).exists()
    model = hidrop.load(model_with(DTOPK), tmp_path)
    runtime = runtime_in(model)
    assert runtime.schedule == hidrop.Schedule.parse(HARD)
    assert runtime.ratios is None


def test_a_schedule_saved_over_a_learned_one_leaves_no_ratios(tmp_path: Path) -> None:
    learned().save_pretrained(tmp_path)
    model_with(HARD).save_pretrained(tmp_path)
    assert not (tmp_path / RATIOS_FILE).exists()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model_with(HARD).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / SCHEDULE_FILE).exists()


def test_a_process_that_does_not_write_gathers_as_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering sharded ratios is a collective: one more in some process would make it wait for ever."""
    model, whole, calls = learned(), Ratios.whole, []

    def counted(ratios: Ratios) -> torch.Tensor:
        calls[-1] += 1
        return whole(ratios)

    monkeypatch.setattr(Ratios, "whole", counted)
    for writes in (True, False):
        calls.append(0)
        model.save_pretrained(tmp_path, is_main_process=writes)
    assert calls == [1, 1]


def test_positional_arguments_of_save_pretrained_are_taken(tmp_path: Path) -> None:
    model_with(HARD).save_pretrained(tmp_path, True)
    assert (tmp_path / SCHEDULE_FILE).exists()


@pytest.mark.parametrize("first", ["compile", "peft"])
def test_adapters_and_ratios_are_saved_together(tmp_path: Path, first: str) -> None:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if first == "peft":
        model = hidrop.compile(
            peft.get_peft_model(tiny_llava(num_layers=3), config), DTOPK, backend="eager"
        )
    else:
        model = peft.get_peft_model(model_with(DTOPK), config)
    model.get_base_model().hidrop_ratios.values.data.copy_(LEARNED)
    model.save_pretrained(tmp_path)
    if first == "compile":
        hidrop.save(model, tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llava(num_layers=3), tmp_path)
    hidrop.load(again, tmp_path, backend="eager")
    assert torch.equal(again.get_base_model().hidrop_ratios.values, LEARNED)
    inputs = batch(model.get_base_model(), [[5, IMAGE, 6, 7]])
    with torch.no_grad():
        ours, theirs = (m.eval()(**inputs).logits for m in (model, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_folders_that_cannot_be_loaded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(hidrop.HidropError, match=r"hidrop.json does not exist"):
        hidrop.load(tiny_llava(num_layers=3), tmp_path)
    with pytest.raises(hidrop.HidropError, match=r"no schedule to save"):
        hidrop.save(tiny_llava(num_layers=3), tmp_path)

    learned().save_pretrained(tmp_path)
    (tmp_path / RATIOS_FILE).rename(tmp_path / "gone")
    with pytest.raises(hidrop.HidropError, match=r"hidrop.safetensors does not exist"):
        hidrop.load(tiny_llava(num_layers=3), tmp_path)

    (tmp_path / "gone").rename(tmp_path / RATIOS_FILE)
    content = json.loads((tmp_path / SCHEDULE_FILE).read_text())
    content["schedule"]["prune"] = {"1": 6}
    (tmp_path / SCHEDULE_FILE).write_text(json.dumps(content))
    with pytest.raises(hidrop.HidropError, match=r"holds \['ratio_1', 'ratio_2'\]"):
        hidrop.load(tiny_llava(num_layers=3), tmp_path)

    for text in ("{", "{}", "[]"):
        (tmp_path / SCHEDULE_FILE).write_text(text)
        with pytest.raises(hidrop.HidropError, match=r"hidrop.json is not what"):
            hidrop.load(tiny_llava(num_layers=3), tmp_path)


def test_a_saved_schedule_too_deep_for_the_model_is_refused(tmp_path: Path) -> None:
    model_with(HARD).save_pretrained(tmp_path)
    with pytest.raises(hidrop.ScheduleError, match=r"prune layer 2"):
        hidrop.load(tiny_llava(num_layers=2), tmp_path)


# Trainer.


@pytest.mark.parametrize(("schedule", "by_path"), [(HARD, True), (DTOPK, False)])
def test_resuming_equals_not_stopping(tmp_path: Path, schedule: str, by_path: bool) -> None:
    model = model_with(schedule)
    trainer(model, tmp_path, max_steps=3, save_steps=2).train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / SCHEDULE_FILE).exists()
    assert (checkpoint / RATIOS_FILE).exists() is (schedule == DTOPK)

    resumed = model_with(schedule)
    trainer(resumed, tmp_path, max_steps=3).train(str(checkpoint) if by_path else True)
    assert_same_parameters(resumed, model)
    if schedule == DTOPK:
        start = model_with(schedule).hidrop_ratios.values
        assert (model.hidrop_ratios.values - start).abs().min() > 1e-4


def test_the_best_checkpoint_brings_its_ratios(tmp_path: Path) -> None:
    model = model_with(DTOPK)
    best = trainer(
        model,
        tmp_path,
        max_steps=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        eval_dataset=DATA[:2],
    )
    best.train()
    directory = best.state.best_model_checkpoint
    assert directory is not None
    assert directory.endswith("checkpoint-1"), "the case needs a best that is not the last"
    other = transformers.LlavaForConditionalGeneration.from_pretrained(directory)
    assert_same_parameters(model, hidrop.load(other, directory, backend="eager"))


def test_trainer_callback_refuses_a_plain_model(tmp_path: Path) -> None:
    with pytest.raises(
        hidrop.HidropError, match=r"this LlavaFor.* is not compiled; hidrop_fx.TrainerCallback"
    ):
        trainer(tiny_llava(num_layers=3), tmp_path, max_steps=1).train()


def test_collated_rows_are_padded_on_the_right() -> None:
    inputs = collate(DATA[:2])
    assert inputs["input_ids"].shape == inputs["labels"].shape


def assert_same_parameters(model: Any, other: Any) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
