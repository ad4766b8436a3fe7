"""Classes whose text decoder has gated delta nets in the place of some attentions."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.support.families.case import Case, random_model, text_config, two_frames
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


# fmt: off
RECURRENT = (
    Case(
        name="qwen3_5", make=_qwen3_5, images=patches, videos=video_patches, video_ids=two_frames, typed=True,
    ),
    Case(
        name="qwen3_5_moe", make=_qwen3_5_moe, images=patches, videos=video_patches, video_ids=two_frames,
        typed=True,
    ),
)
# fmt: on
