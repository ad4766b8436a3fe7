"""transformers' Trainer and PEFT's adapters on classes with tiles, with deepstack, and with videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hidrop_fx as hidrop
from tests.models.test_families import labelled
from tests.support.families import CASES, IMAGE, VIDEO, make_batch
from tests.support.runtimes import compiled_eagerly

SCHEDULE = hidrop.Schedule(inject=1, prune={1: 2})
ROWS = {
    "idefics3": [[5, IMAGE, 6, 7], [8, IMAGE, 9, 10, IMAGE, 11]],
    "qwen3_vl": [[5, IMAGE, 6, 7], [8, VIDEO, 9, 10, IMAGE, 11]],
    "llava_onevision": [[5, IMAGE, 6, 7], [8, VIDEO, 9, 10, IMAGE, 11]],
}
each = pytest.mark.parametrize("name", ROWS)


def given(name: str, model: Any) -> dict[str, Any]:
    batch = make_batch(CASES[name], model, ROWS[name], "right")
    return {**batch.inputs, "labels": labelled(batch)}


@each
def test_adapters_get_the_gradients_that_hugging_face_gives(name: str) -> None:
    base = CASES[name].make()
    inputs = given(name, base)
    config = LoraConfig(r=2, target_modules=r".*(language_model|text_model).*(q_proj|v_proj)")
    model = get_peft_model(base, config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.1)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, wanted = step()
    assert wanted
    with compiled_eagerly(model, hidrop.Schedule()):
        found, gradients = step()
    torch.testing.assert_close(found, loss, atol=1e-4, rtol=1e-4)
    assert set(gradients) == set(wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(gradients[key], gradient, atol=1e-3, rtol=1e-3)
    with compiled_eagerly(model, SCHEDULE):
        pruned, gradients = step()
    assert set(gradients) == set(wanted)
    assert not torch.equal(pruned, loss)


@each
def test_the_trainer_comes_to_the_weights_of_hugging_face(name: str, tmp_path: Path) -> None:
    def trained(compiled: bool) -> dict[str, Tensor]:
        model = CASES[name].make()
        inputs = given(name, model)
        if compiled:
            hidrop.compile(model, hidrop.Schedule(), backend="eager")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, optim="sgd",
            learning_rate=0.05, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
            remove_unused_columns=False, disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        Trainer(
            model=model,
            args=arguments,
            train_dataset=[inputs, inputs],  # type: ignore[arg-type]
            data_collator=lambda samples: dict(samples[0]),
        ).train()
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    before = dict(CASES[name].make().named_parameters())
    wanted, found = trained(False), trained(True)
    assert any(not torch.equal(value, before[key]) for key, value in wanted.items())
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )
