"""Llama 4: chunks, layers without RoPE whose queries are scaled by position, experts, tiles in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers as hf

from tests.support.families.case import (
    CLOSING,
    IMAGE_TOKEN,
    MARKER,
    SEPARATOR,
    Case,
    random_model,
    random_pixels,
    text_config,
)
from tests.support.families.tiles import tiles_of

CHUNK = 6


def tiles(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    total = sum(tiles_of(number) for number in range(sum(counts)))
    return {"pixel_values": random_pixels(total, 3, 16, 16)}


def rows_of_tiles(lengths: Sequence[int], token: int) -> list[int]:
    """START t t SEPARATOR t t SEPARATOR MARKER t t CLOSING, the last the whole image."""
    ids = [CLOSING]
    for length in lengths[:-1]:
        ids += [token] * length + [SEPARATOR]
    return [*ids, MARKER, *[token] * lengths[-1], CLOSING]


def llama4(**more: Any) -> Any:
    text = text_config(
        hf.Llama4TextConfig,
        **{
            "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": CHUNK,
            "no_rope_layers": [1, 0, 1], "interleave_moe_layer_step": 2, "floor_scale": 4, "attn_scale": 0.5,
            **more,
        },
    )  # fmt: skip
    vision = hf.Llama4VisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vision_output_dim=32, image_size=16, patch_size=4, projector_input_dim=32, projector_output_dim=32,
    )  # fmt: skip
    config = hf.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return random_model(hf.Llama4ForConditionalGeneration, config)


CHUNKED = (
    Case(
        name="llama4",
        make=llama4,
        images=tiles,
        entries=tiles_of,
        ids=rows_of_tiles,
        counts_padding=True,
    ),
)
