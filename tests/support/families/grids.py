"""Classes whose images are flat patches with a grid (time, height, width): Qwen's, GLM's, and relatives."""

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
    two_frames,
)

_PATCH = 3 * 2 * 4 * 4
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def grids_of(count: int, time: int = 1) -> list[list[int]]:
    return [[time, 4, 6 if k % 2 else 4] for k in range(count)]


def patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor(grids_of(sum(counts)))
    return {
        "pixel_values": random_pixels(int(grids.prod(1).sum()), _PATCH),
        "image_grid_thw": grids,
    }


def video_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor(grids_of(sum(counts), time=2))
    pixels = random_pixels(int(grids.prod(1).sum()), _PATCH)
    return {"pixel_values_videos": pixels, "video_grid_thw": grids}


def square_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor(grids_of(sum(counts)))
    pixels = random_pixels(int(grids.prod(1).sum()), 3, 4, 4)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, **more,
    }  # fmt: skip


TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": 100,
    "vision_end_token_id": 101, "tie_word_embeddings": False,
}  # fmt: skip


def _qwen2_vl() -> Any:
    text = text_config(hf.Qwen2VLTextConfig, rope_parameters=MROPE)
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": 4,
    }
    config = hf.Qwen2VLConfig(text_config=text.to_dict(), vision_config=vision, **TOKENS)
    return random_model(hf.Qwen2VLForConditionalGeneration, config)


def _qwen2_5_vl() -> Any:
    text = text_config(hf.Qwen2_5_VLTextConfig, rope_parameters=MROPE)
    tower = vision(window_size=16, fullatt_block_indexes=[1])
    config = hf.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=tower, **TOKENS)
    return random_model(hf.Qwen2_5_VLForConditionalGeneration, config)


def deepstack_vision() -> dict[str, Any]:
    return vision(
        depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=16, spatial_merge_size=2
    )


def _qwen3_vl() -> Any:
    text = text_config(hf.Qwen3VLTextConfig, rope_parameters=MROPE)
    config = hf.Qwen3VLConfig(
        text_config=text.to_dict(), vision_config=deepstack_vision(), **TOKENS
    )
    return random_model(hf.Qwen3VLForConditionalGeneration, config)


def _qwen3_vl_moe() -> Any:
    text = text_config(
        hf.Qwen3VLMoeTextConfig, rope_parameters=MROPE, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24,
    )  # fmt: skip
    config = hf.Qwen3VLMoeConfig(
        text_config=text.to_dict(), vision_config=deepstack_vision(), **TOKENS
    )
    return random_model(hf.Qwen3VLMoeForConditionalGeneration, config)


def _glm(config_class: Any, model_class: Any, text_class: Any) -> Any:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    text = text_config(text_class, rope_parameters=rope)
    tower = vision(image_size=16)
    config = config_class(
        text_config=text.to_dict(), vision_config=tower, image_start_token_id=100,
        image_end_token_id=101, video_start_token_id=102, video_end_token_id=103, **TOKENS,
    )  # fmt: skip
    return random_model(model_class, config)


def _glm4v() -> Any:
    return _glm(hf.Glm4vConfig, hf.Glm4vForConditionalGeneration, hf.Glm4vTextConfig)


def _glm46v() -> Any:
    return _glm(hf.Glm46VConfig, hf.Glm46VForConditionalGeneration, hf.Glm4vTextConfig)


def _glm_ocr() -> Any:
    classes = hf.models.glm_ocr
    return _glm(hf.GlmOcrConfig, hf.GlmOcrForConditionalGeneration, classes.GlmOcrTextConfig)


def _exaone4_5() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = text_config(hf.Exaone4Config, sliding_window=6, layer_types=kinds)
    tower = vision(window_size=16, fullatt_block_indexes=[1], num_key_value_heads=2)
    config = hf.Exaone4_5_Config(
        text_config=text.to_dict(), vision_config=tower, image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
    )  # fmt: skip
    return random_model(hf.Exaone4_5_ForConditionalGeneration, config)


def _paddleocr_vl() -> Any:
    text = text_config(hf.models.paddleocr_vl.PaddleOCRTextConfig, rope_parameters=MROPE)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = hf.PaddleOCRVLConfig(text_config=text.to_dict(), vision_config=vision, **TOKENS)
    return random_model(hf.PaddleOCRVLForConditionalGeneration, config)


def _video_llama_3() -> Any:
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 4,
    }  # fmt: skip
    config = hf.VideoLlama3Config(
        text_config=text_config(hf.Qwen2Config).to_dict(), vision_config=vision,
        image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN,
    )  # fmt: skip
    return random_model(hf.VideoLlama3ForConditionalGeneration, config)


def _merged(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor(grids_of(sum(counts)))
    return {
        "pixel_values": random_pixels(int(grids.prod(1).sum()), 48),
        "image_grid_thw": grids,
        "image_merge_sizes": torch.tensor([1, 2] * sum(counts))[: sum(counts)],
    }


def _merged_videos(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor(grids_of(sum(counts), time=2))
    return {
        "pixel_values_videos": random_pixels(int(grids.prod(1).sum()), 48),
        "video_grid_thw": grids,
        "video_merge_sizes": torch.full((sum(counts),), 2),
    }


# fmt: off
GRIDS = (
    Case(name="qwen2_vl", make=_qwen2_vl, images=patches, videos=video_patches, typed=True),
    Case(name="qwen2_5_vl", make=_qwen2_5_vl, images=patches, videos=video_patches, typed=True),
    Case(
        name="qwen3_vl", make=_qwen3_vl, images=patches, videos=video_patches, video_ids=two_frames,
        typed=True, deepstack="behind",
    ),
    Case(
        name="qwen3_vl_moe", make=_qwen3_vl_moe, images=patches, videos=video_patches,
        video_ids=two_frames, typed=True, deepstack="behind",
    ),
    Case(
        name="glm4v", make=_glm4v, images=patches, videos=video_patches, video_ids=two_frames, typed=True,
        same_token=True, one_kind=True,
    ),
    Case(
        name="glm46v", make=_glm46v, images=patches, videos=video_patches, video_ids=two_frames, typed=True,
        same_token=True, one_kind=True,
    ),
    Case(
        name="glm_ocr", make=_glm_ocr, images=patches, videos=video_patches, video_ids=two_frames, typed=True,
        same_token=True, one_kind=True,
    ),
    Case(name="exaone4_5", make=_exaone4_5, images=patches, videos=video_patches),
    Case(name="paddleocr_vl", make=_paddleocr_vl, images=square_patches, typed=True),
    Case(name="video_llama_3", make=_video_llama_3, images=_merged, videos=_merged_videos),
)
# fmt: on
