"""A compiled model in the trainers that people use: transformers' Trainer, DDP, TRL's SFTTrainer."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import hidrop_fx as hidrop
from tests.support import counter, distributed_step
from tests.support.models import PAD, VOCAB, tiny_llava
from tests.support.reference import reference_logits
from tests.support.runtimes import runtime_in
from tests.support.trainers import DATA, collate, options, trainer

PRUNED = "inject=1,prune=1:6+2:3"


def losses(found: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in found.state.log_history if name in entry]


def assert_same_parameters(model: Any, other: Any) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# Trainer.


def test_trainer_gives_what_it_gives_for_the_plain_model(tmp_path: Path) -> None:
    """With accumulation over unequal micro-batches and evaluation between the steps."""
    ours: Any = hidrop.compile(tiny_llava(num_layers=2), "identity", backend="eager")
    theirs = tiny_llava(num_layers=2)
    found = []
    for model in (ours, theirs):
        found.append(
            trainer(
                model,
                tmp_path,
                callback=False,
                eval_dataset=DATA[:3],
                max_steps=3,
                gradient_accumulation_steps=2,
                eval_strategy="steps",
                eval_steps=1,
                weight_decay=0.01,
                learning_rate=1e-3,
            )
        )
        with counter.expect(captures={"train": 1, "eval": 1} if model is ours else {}):
            found[-1].train()
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-5)
    assert losses(found[0], "eval_loss") == pytest.approx(losses(found[1], "eval_loss"), rel=1e-4)
    assert len(losses(found[0], "eval_loss")) == 3
    assert_same_parameters(ours, theirs)


def test_trainer_in_bf16_with_recomputation(tmp_path: Path) -> None:
    """Trainer puts a wrapper of its own in the place of model.forward."""
    model: Any = hidrop.compile(tiny_llava(num_layers=3), PRUNED, backend="eager")
    found = trainer(
        model, tmp_path, callback=False, max_steps=4, bf16=True, gradient_checkpointing=True
    )
    found.train()
    assert all(torch.isfinite(torch.tensor(losses(found))))
    assert losses(found)[-1] != losses(found)[0]
    runtime = runtime_in(model)
    assert runtime.last_layout is not None
    assert len(runtime.programs.captures) == 1


def test_a_second_stage_in_bf16_runs_its_own_schedule(tmp_path: Path) -> None:
    """Trainer's wrapper of the first stage stays around the second, and around the model restored."""
    model: Any = hidrop.compile(tiny_llava(num_layers=3), "identity", backend="eager")
    trainer(model, tmp_path, callback=False, max_steps=1, bf16=True).train()
    around = model.forward
    hidrop.compile(model, PRUNED, backend="eager")
    stage = trainer(model, tmp_path, callback=False, max_steps=1, bf16=True)
    stage.train()
    assert model.forward == around
    inputs = collate(DATA[:3])
    twin: Any = tiny_llava(num_layers=3).train()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model(**inputs).loss
        logits = reference_logits(twin, hidrop.Schedule.parse(PRUNED), inputs)[:, :-1]
        expected = cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
        assert found == pytest.approx(float(expected), rel=0.02)
        assert found != expected, "bf16"
        hidrop.restore(model)
        assert model(**inputs).loss == pytest.approx(float(twin(**inputs).loss), rel=0.02)
        unwrapped = stage.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert unwrapped(**inputs).loss == pytest.approx(float(twin(**inputs).loss), rel=1e-4)


# DDP.


def test_two_processes_give_the_gradients_of_one_with_both_batches(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (str(tmp_path), port)
    both = torch.multiprocessing.spawn(distributed_step.half, arguments, nprocs=2, join=False)
    while not both.join():  # one has ended, the other not yet; each has a limit of its own
        pass
    model, inputs = distributed_step.model_and_inputs()
    model(**inputs).loss.backward()
    expected = distributed_step.gradients(model)
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == expected.keys()
    assert "hidrop_ratios.values" in found
    for name, gradient in expected.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# TRL.


@pytest.fixture(scope="module")
def trl() -> Any:
    pytest.importorskip("datasets", reason="datasets, which TRL needs, is not installed")
    return pytest.importorskip("trl", reason="trl, an optional dependency, is not installed")


def sft(trl: Any, model: Any, directory: Path, loss_type: str, peft_config: Any) -> Any:
    import datasets
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3")),
        pad_token=f"w{PAD}",
        eos_token="w2",
        unk_token="w3",
    )
    text = [{k: v for k, v in example.items() if k != "pixel_values"} for example in DATA]
    numbered = [example | {"number": n} for n, example in enumerate(text)]
    given = options(directory, max_steps=2, gradient_accumulation_steps=2)
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **given,
            loss_type=loss_type,
            max_length=None,
            bf16=False,
            gradient_checkpointing=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(numbered),
        eval_dataset=datasets.Dataset.from_list(numbered[:2]),
        data_collator=lambda rows: collate([DATA[row["number"]] for row in rows]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def lora() -> Any:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    return peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)")


@pytest.mark.parametrize(("loss_type", "adapted"), [("nll", False), ("dft", True)])
def test_sft_trainer_gives_what_it_gives_for_the_plain_model(
    trl: Any, tmp_path: Path, loss_type: str, adapted: bool
) -> None:
    results = []
    for compiled in (True, False):
        model = tiny_llava(num_layers=2)
        if compiled:
            hidrop.compile(model, "identity", backend="eager")
        found = sft(trl, model, tmp_path, loss_type, lora() if adapted else None)
        found.train()
        results.append((losses(found), found.evaluate()["eval_loss"], found.model))
    (ours, evaluated, model), (theirs, expected, other) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert evaluated == pytest.approx(expected, rel=1e-4)
    assert_same_parameters(model, other)


def test_sft_trainer_under_a_schedule_has_the_loss_of_forward(trl: Any, tmp_path: Path) -> None:
    """Its head calls the model without labels, and still the answers choose the vision tokens."""
    model: Any = hidrop.compile(tiny_llava(num_layers=3), PRUNED, backend="eager")
    found = sft(trl, model, tmp_path, "nll", lora())
    found.model.train()
    inputs = collate(DATA[3:6])
    with torch.no_grad():
        fused = found.compute_loss(found.model, dict(inputs))
        expected = found.model(**inputs).loss
        runtime = runtime_in(model)
        blind = runtime.call({k: v for k, v in inputs.items() if k != "labels"})
        informed = runtime.call(inputs, labels=inputs["labels"])
    torch.testing.assert_close(fused, expected)
    assert not torch.equal(blind.hidden, informed.hidden), "labels matter to this batch"
