"""A tiny data set, and transformers' Trainer on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import hidrop_fx as hidrop
from tests.support.models import IMAGE, IMAGE_TOKEN, PAD, batch, tiny_llava

_ROWS: list[list[int | str]] = [
    [5, IMAGE, 6, 7, 8],
    [9, 10, IMAGE, 11, 12, 13],
    [14, 15, 16],
    [IMAGE, 17, 18, IMAGE, 19, 20],
    [21, IMAGE, 22, 23],
    [24, 25, IMAGE, 26, 27, 28, 29],
]


def _example(row: list[int | str], index: int) -> dict[str, Any]:
    inputs: dict[str, Any] = batch(tiny_llava(num_layers=1), [row], seed=index)
    ids = inputs["input_ids"][0]
    labels = ids.clone()
    labels[:-2] = -100
    example = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    if "pixel_values" in inputs:
        example["pixel_values"] = inputs["pixel_values"]
    return example


DATA = [_example(row, index) for index, row in enumerate(_ROWS)]
"""Dicts, as a processor would make them; the last two tokens of each are the answer."""


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    width = max(len(example["input_ids"]) for example in examples)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [e[name] + [value] * (width - len(e[name])) for e in examples]
        return torch.tensor(rows)

    inputs: dict[str, Any] = {
        "input_ids": padded("input_ids", PAD),
        "labels": padded("labels", -100),
    }
    inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
    pixels = [e["pixel_values"] for e in examples if e.get("pixel_values") is not None]
    if pixels:
        inputs["pixel_values"] = torch.cat([torch.as_tensor(p) for p in pixels])
    assert (inputs["input_ids"] == IMAGE_TOKEN).any() == bool(pixels)
    return inputs


def options(directory: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of TrainingArguments and its like."""
    given = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "steps" if "save_steps" in changes else "no",
    }
    return given | changes


def trainer(
    model: Any, directory: Path, *, eval_dataset: Any = None, callback: bool = True, **changes: Any
) -> transformers.Trainer:
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**options(directory, **changes)),
        train_dataset=DATA,
        eval_dataset=eval_dataset,
        data_collator=collate,
        callbacks=[hidrop.TrainerCallback()] if callback else [],
    )
