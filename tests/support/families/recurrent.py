"""Classes whose text decoder has gated delta nets in the place of some attentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.support.families.case import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    Case,
    random_model,
    random_pixels,
    text_config,
    two_frames,
)
from tests.support.families.grids import MROPE, TOKENS, patches, video_patches, vision

LAYERS = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4, "layer_types": LAYERS, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 6, "linear_conv_kernel_dim": 3,
}  # fmt: skip
ROPE = {**MROPE, "partial_rotary_factor": 1.0}


def _qwen3_5() -> Any:
    text = text_config(hf.Qwen3_5TextConfig, rope_parameters=ROPE, **SIZES)
    tower = vision(num_position_embeddings=16)
    config = hf.Qwen3_5Config(text_config=text.to_dict(), vision_config=tower, **TOKENS)
    return random_model(hf.Qwen3_5ForConditionalGeneration, config)


def _qwen3_5_moe() -> Any:
    text = text_config(
        hf.Qwen3_5MoeTextConfig, rope_parameters=ROPE, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, shared_expert_intermediate_size=24, **SIZES,
    )  # fmt: skip
    tower = vision(num_position_embeddings=16)
    config = hf.Qwen3_5MoeConfig(text_config=text.to_dict(), vision_config=tower, **TOKENS)
    return random_model(hf.Qwen3_5MoeForConditionalGeneration, config)


def _minicpmv4_6() -> Any:
    text = text_config(hf.Qwen3_5TextConfig, rope_parameters=ROPE, **SIZES)
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
        "image_size": 32,
    }  # fmt: skip
    config = hf.MiniCPMV4_6Config(
        text_config=text.to_dict(), vision_config=tower, insert_layer_id=0, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
    )  # fmt: skip
    return random_model(hf.MiniCPMV4_6ForConditionalGeneration, config)


def _packed(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """All patches in one row, and the patches of each image by height and width: of sixteen, one token."""
    sizes = torch.tensor([[8, 8] if k % 2 else [8, 12] for k in range(sum(counts))])
    return random_pixels(1, 3, 4, 4 * int(sizes.prod(1).sum())), sizes


def _packed_images(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    pixels, sizes = _packed(counts)
    return {"pixel_values": pixels, "target_sizes": sizes}


def _packed_videos(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    pixels, sizes = _packed(counts)
    return {"pixel_values_videos": pixels, "target_sizes_videos": sizes}


# fmt: off
RECURRENT = (
    Case(name="minicpmv4_6", make=_minicpmv4_6, images=_packed_images, videos=_packed_videos),
    Case(
        name="qwen3_5", make=_qwen3_5, images=patches, videos=video_patches, video_ids=two_frames, typed=True,
    ),
    Case(
        name="qwen3_5_moe", make=_qwen3_5_moe, images=patches, videos=video_patches, video_ids=two_frames,
        typed=True,
    ),
)
# fmt: on
