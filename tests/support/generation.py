"""Answers of `generate`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

KEEPS_IMAGES_TOGETHER = hasattr(GenerationMixin, "_maybe_prepare_encoder_kwargs_for_generation")
"""False for transformers before 5.23, whose beams and several answers mix up rows that have several images."""


def new_tokens(
    model: Any, inputs: dict[str, Tensor], count: int = 5, **options: Any
) -> list[list[int]]:
    """Generate `count` tokens greedily, whatever ends the answer; return them row by row, without the prompt."""
    given = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None} | options
    sequences = model.generate(**inputs, **given)
    found: list[list[int]] = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return found


def repeated_together(rows: list[Any], image: Any) -> list[Any]:
    """Return the rows of which Hugging Face's own `generate` keeps the images together where it repeats them.

    Before transformers 5.23 it repeats each image by itself, a, a, b, b: rows of several get those of others.
    """
    if KEEPS_IMAGES_TOGETHER:
        return rows
    return [row for row in rows if list(row).count(image) < 2]
