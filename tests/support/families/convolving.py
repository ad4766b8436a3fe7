"""Classes whose text decoder has short convolutions in the place of some attentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf

from tests.support.families.case import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    Case,
    random_model,
    random_pixels,
    text_config,
)
from tests.support.families.grids import patches, video_patches

LAYERS = ["conv", "full_attention", "full_attention", "conv"]


def any_grid(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Images of two sizes as patches, padded to the longer."""
    shapes = torch.tensor([[4, 6] if k % 2 else [4, 4] for k in range(sum(counts))])
    lengths = shapes.prod(dim=1)
    places = torch.arange(int(lengths.max()))
    return {
        "pixel_values": random_pixels(len(shapes), int(lengths.max()), 3 * 4 * 4),
        "spatial_shapes": shapes,
        "pixel_attention_mask": (places < lengths[:, None]).long(),
    }


def _lfm2_vl() -> Any:
    text = text_config(
        hf.Lfm2Config, num_hidden_layers=4, layer_types=LAYERS, block_auto_adjust_ff_dim=False
    )
    tower = hf.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_patches=16,
        patch_size=4, vision_use_head=False,
    )  # fmt: skip
    config = hf.Lfm2VlConfig(
        text_config=text, vision_config=tower, image_token_id=IMAGE_TOKEN, projector_hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Lfm2VlForConditionalGeneration, config)


def _lfm3_vl() -> Any:
    kinds = ["conv", "full_attention", "sliding_attention", "conv"]
    text = text_config(hf.Lfm3Config, num_hidden_layers=4, layer_types=kinds, sliding_window=5)
    tower = hf.Lfm3VlVisionConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, patch_size=4, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    config = hf.Lfm3VlConfig(
        text_config=text, vision_config=tower, image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN,
        vision_start_token_id=100, vision_end_token_id=101, projector_hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Lfm3VlForConditionalGeneration, config)


CONVOLVING = (
    Case(name="lfm2_vl", make=_lfm2_vl, images=any_grid),
    Case(name="lfm3_vl", make=_lfm3_vl, images=patches, videos=video_patches),
)
