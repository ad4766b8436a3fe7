"""Idefics and its relatives: pixels by row of the batch, absent images all zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf

from tests.support.families.case import (
    IMAGE_TOKEN,
    Case,
    closed_run,
    random_model,
    random_pixels,
    text_config,
)
from tests.support.families.tiles import tiles_of

_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def by_row(model: Any, counts: Sequence[int], *, split: bool = True) -> dict[str, Any]:
    number, tiles = 0, []
    for count in counts:
        own = range(number, number + count)
        tiles.append(sum(tiles_of(k) if split else 1 for k in own))
        number += count
    pixels = torch.zeros(len(counts), max(tiles), 3, 16, 16)
    drawn = random_pixels(len(counts), max(tiles), 3, 16, 16)
    for row, count in enumerate(tiles):
        pixels[row, :count] = drawn[row, :count]
    return {"pixel_values": pixels}


def whole_by_row(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    return by_row(model, counts, split=False)


def _idefics2() -> Any:
    perceiver = hf.models.idefics2.configuration_idefics2.Idefics2PerceiverConfig(
        hidden_size=32, resampler_n_latents=5, resampler_depth=1, resampler_n_heads=4,
        resampler_head_dim=8, num_key_value_heads=2,
    )  # fmt: skip
    config = hf.Idefics2Config(
        text_config=text_config(hf.MistralConfig, sliding_window=None), vision_config=_VISION,
        perceiver_config=perceiver.to_dict(), image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.Idefics2ForConditionalGeneration, config)


def _idefics3() -> Any:
    config = hf.Idefics3Config(
        text_config=text_config(hf.LlamaConfig), vision_config=_VISION, image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )  # fmt: skip
    return random_model(hf.Idefics3ForConditionalGeneration, config)


def _smolvlm() -> Any:
    config = hf.SmolVLMConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=_VISION, image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )  # fmt: skip
    return random_model(hf.SmolVLMForConditionalGeneration, config)


def _granite_docling() -> Any:
    text = text_config(
        hf.GraniteDoclingTextConfig, embedding_multiplier=1.5, logits_scaling=2.0, residual_multiplier=0.8,
        attention_multiplier=0.4,
    )  # fmt: skip
    vision = hf.GraniteDoclingVisionConfig(
        **_VISION, out_hidden_size=32, scale_factor=2, deepstack_visual_indexes=[0, 1]
    )
    config = hf.GraniteDoclingConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.GraniteDoclingForConditionalGeneration, config)


def masked_by_row(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Which tiles there are is told."""
    given = by_row(model, counts)
    given["pixel_attention_mask"] = (given["pixel_values"] != 0).flatten(2).any(-1)
    return given


def _halved(rows: torch.Tensor) -> torch.Tensor:
    return rows / 2


BY_ROW = (
    Case(
        name="granite_docling",
        make=_granite_docling,
        images=masked_by_row,
        entries=tiles_of,
        by_row=True,
        ids=closed_run,
        deepstack="behind",
        logits=_halved,
    ),
    Case(name="idefics2", make=_idefics2, images=whole_by_row, by_row=True),
    Case(
        name="idefics3",
        make=_idefics3,
        images=by_row,
        entries=tiles_of,
        by_row=True,
        ids=closed_run,
    ),
    Case(
        name="smolvlm", make=_smolvlm, images=by_row, entries=tiles_of, by_row=True, ids=closed_run
    ),
)
