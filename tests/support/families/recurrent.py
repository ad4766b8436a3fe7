"""Classes whose text decoder has gated delta nets, or Mamba-2, in the place of some attentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf

from tests.support.families.case import (
    IMAGE_TOKEN,
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


def _nemotron_h_omni() -> Any:
    text = text_config(
        hf.NemotronHConfig, num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=6,
        conv_kernel=3, chunk_size=4, layers_block_type=["linear_attention", "full_attention", "full_attention", "mlp"],
    )  # fmt: skip
    tower = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0, "patch_size": 4,
        "image_size": 16, "max_img_size": 32, "num_cls_tokens": 1, "num_registers": 1, "summary_idxs": [0],
        "video_temporal_patch_size": 2, "torch_dtype": "float32",
    }  # fmt: skip
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text.to_dict(), vision_config=tower, vision_hidden_size=16, projector_hidden_size=24,
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.NemotronH_Omni_Reasoning_V3, config)


def _packed_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor([[4, 6 if k % 2 else 4] for k in range(sum(counts))])
    return {
        "pixel_values": random_pixels(int(grids.prod(1).sum()), 3 * 4 * 4),
        "image_grid_hw": grids,
    }


# fmt: off
RECURRENT = (
    Case(
        name="qwen3_5", make=_qwen3_5, images=patches, videos=video_patches, video_ids=two_frames, typed=True,
    ),
    Case(
        name="qwen3_5_moe", make=_qwen3_5_moe, images=patches, videos=video_patches, video_ids=two_frames,
        typed=True,
    ),
    Case(name="nemotron_h_omni", make=_nemotron_h_omni, images=_packed_patches),
)
# fmt: on
