"""Configurations of public checkpoints, written out by hand, smaller in depth and width alone.

checkpoint = CHECKPOINTS["Qwen/Qwen2.5-VL-7B-Instruct"]
model = checkpoint.make()
model(**checkpoint.inputs(model))

Vocabularies, token ids, patch and image sizes, windows, RoPE scalings, caps and legacy spellings are meant to be the published ones.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.support.families.case import random_model, random_pixels

WIDTH, HEADS, HEAD = 64, 4, 16
TOWER: dict[str, int] = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 2, "depth": 4,
    "num_attention_heads": 2, "num_heads": 2, "projection_dim": WIDTH, "out_hidden_size": WIDTH, "head_dim": 16,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A class and the published configuration, with what a call of it has."""

    of: str
    config: dict[str, Any]
    images: Callable[[], dict[str, Tensor]]
    heads: tuple[int, int]
    """Query and key heads as published."""
    types: str = ""
    """Argument that has 1 at places of images."""
    layers: int = 4
    filters: tuple[int, int] = (1, 2)
    """Layers that attend, of those left."""
    tiles: int = 1
    """Runs of places of an image."""

    def make(self) -> Any:
        cls = getattr(hf, self.of)
        return random_model(cls, cls.config_class.from_dict(self.small()))

    def small(self) -> dict[str, Any]:
        """The configuration with fewer layers and heads, and narrower."""
        given = deepcopy(self.config)
        text = given.get("text_config", given)
        text |= {
            "num_hidden_layers": self.layers, "hidden_size": WIDTH, "intermediate_size": 96,
            "num_attention_heads": HEADS, "head_dim": HEAD,
            "num_key_value_heads": max(1, HEADS * self.heads[1] // self.heads[0]),
        }  # fmt: skip
        rope = text.get("rope_scaling") or {}
        if "mrope_section" in rope:
            half = sum(rope["mrope_section"]) * HEAD // 128  # heads are 128 wide as published
            rope["mrope_section"] = [part * HEAD // 128 for part in rope["mrope_section"]]
            rope["mrope_section"][0] += half - sum(rope["mrope_section"])
        vision = given["vision_config"]
        wide = vision.get("embed_dim") is not None  # Qwen2-VL: hidden_size is the width of the text
        vision |= {key: value for key, value in TOWER.items() if key in vision}
        if wide:
            vision["hidden_size"] = WIDTH
        for key in ("deepstack_visual_indexes", "fullatt_block_indexes"):
            if key in vision:
                vision[key] = list(range(min(len(vision[key]), 3)))
        if "projection_dim" in given:
            given["projection_dim"] = WIDTH
        return given

    def inputs(self, model: Any) -> dict[str, Any]:
        """A prompt of an image and words, and one of words, padded on the left."""
        given = self.images()
        token = model.config.image_token_id
        features = model.model.get_image_features(**given, return_dict=True).pooler_output
        count = sum(part.shape[:-1].numel() for part in features)
        places: list[int] = []
        for tile in range(self.tiles):
            places += [100 + tile, *[token] * (count // self.tiles)]
        row = [5, *places, 200, 7, 8, 9]
        ids = torch.tensor([row, [0] * (len(row) - 4) + [11, 12, 13, 14]])
        mask = torch.ones_like(ids)
        mask[1, :-4] = 0
        if "pixel_values" in given and self.of.startswith(("Idefics3", "SmolVLM")):
            given["pixel_values"] = torch.cat([given["pixel_values"], 0 * given["pixel_values"]])
        types = {self.types: (ids == token).long()} if self.types else {}
        return {**given, "input_ids": ids, "attention_mask": mask, **types}


def _square(side: int, count: int = 1) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": random_pixels(count, 3, side, side)}


def _anyres(side: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "pixel_values": random_pixels(1, 3, 3, side, side),
        "image_sizes": torch.tensor([[side - 30, 2 * side]]),
    }


def _grid(patch: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "pixel_values": random_pixels(8 * 12, 3 * 2 * patch * patch),
        "image_grid_thw": torch.tensor([[1, 8, 12]]),
    }


def _pixtral() -> dict[str, Tensor]:
    return {"pixel_values": random_pixels(1, 3, 64, 96), "image_sizes": torch.tensor([[64, 96]])}


def _naflex() -> dict[str, Tensor]:
    return {
        "pixel_values": random_pixels(1, 8 * 12, 3 * 16 * 16),
        "spatial_shapes": torch.tensor([[8, 12]]),
        "pixel_attention_mask": torch.ones(1, 8 * 12, dtype=torch.long),
    }


def _sized() -> dict[str, Tensor]:
    return {"pixel_values": random_pixels(1, 3, 56, 84), "image_sizes": torch.tensor([[56, 84]])}


_CLIP = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    "vocab_size": 32000,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
_QWEN2 = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
    "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
    "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}  # fmt: skip
_GRID_VISION = {
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}

# fmt: off
CHECKPOINTS = {
    "llava-hf/llava-1.5-7b-hf": Checkpoint(
        of="LlavaForConditionalGeneration", images=_square(336), heads=(32, 32),
        config={
            "ignore_index": -100, "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
            "image_seq_length": 576, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5", "max_position_embeddings": 4096, "model_type": "llama",
                "rms_norm_eps": 1e-05, "vocab_size": 32064,
            },
            "vision_config": _CLIP,
        },
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": Checkpoint(
        of="LlavaNextForConditionalGeneration", images=_anyres(336), heads=(32, 8),
        config={
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "image_token_index": 32000, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            "use_image_newline_parameter": True, "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default", "vocab_size": 32064,
            "text_config": {
                "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "intermediate_size": 14336,
                "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32064,
            },
            "vision_config": _CLIP,
        },
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Checkpoint(
        of="LlavaOnevisionForConditionalGeneration", images=_anyres(384), heads=(28, 4),
        config={
            "image_grid_pinpoints": [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)],
            "image_token_index": 151646, "video_token_index": 151647, "projector_hidden_act": "gelu",
            "tie_word_embeddings": False, "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {
                "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "model_type": "qwen2",
                "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
                "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False, "vocab_size": 152000,
            },
            "vision_config": {**_SIGLIP, "image_size": 384, "num_hidden_layers": 26},
        },
    ),
    "Qwen/Qwen2-VL-7B-Instruct": Checkpoint(
        of="Qwen2VLForConditionalGeneration", images=_grid(14), heads=(28, 4), types="mm_token_type_ids",
        config={
            **_QWEN2, "max_position_embeddings": 32768, "model_type": "qwen2_vl",
            "vision_config": {
                **_GRID_VISION, "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584,
            },
        },
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": Checkpoint(
        of="Qwen2_5_VLForConditionalGeneration", images=_grid(14), heads=(28, 4), types="mm_token_type_ids",
        config={
            **_QWEN2, "max_position_embeddings": 128000, "model_type": "qwen2_5_vl",
            "vision_config": {
                **_GRID_VISION, "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                "num_heads": 16, "out_hidden_size": 3584, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            },
        },
    ),
    "Qwen/Qwen3-VL-8B-Instruct": Checkpoint(
        of="Qwen3VLForConditionalGeneration", images=_grid(16), heads=(32, 8), types="mm_token_type_ids",
        config={
            "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
            "vision_end_token_id": 151653, "model_type": "qwen3_vl", "tie_word_embeddings": False,
            "text_config": {
                "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
                "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
                "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 32,
                "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
                "rope_theta": 5000000, "vocab_size": 151936,
            },
            "vision_config": {
                "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304, "model_type": "qwen3_vl",
                "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16,
                "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
        },
    ),
    "google/gemma-3-4b-it": Checkpoint(
        of="Gemma3ForConditionalGeneration", images=_square(896), heads=(8, 4), types="token_type_ids", layers=6,
        config={
            "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
            "image_token_index": 262144, "mm_tokens_per_image": 256, "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "vision_config": {**_SIGLIP, "image_size": 896},
        },
    ),
    "google/paligemma2-3b-pt-224": Checkpoint(
        of="PaliGemmaForConditionalGeneration", images=_square(224), heads=(8, 4),
        config={
            "image_token_index": 257152, "model_type": "paligemma", "num_hidden_layers": 26, "pad_token_id": 0,
            "projection_dim": 2304,
            "text_config": {
                "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
                "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
                "model_type": "gemma2", "num_hidden_layers": 26, "num_image_tokens": 256, "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256, "sliding_window": 4096, "vocab_size": 257216,
            },
            "vision_config": {**_SIGLIP, "image_size": 224, "num_image_tokens": 256, "projection_dim": 2304},
        },
    ),
    "HuggingFaceTB/SmolVLM-Instruct": Checkpoint(
        of="Idefics3ForConditionalGeneration", heads=(32, 32), tiles=2,
        images=lambda: {"pixel_values": random_pixels(1, 2, 3, 384, 384)},
        config={
            "image_token_id": 49153, "model_type": "idefics3", "scale_factor": 3, "tie_word_embeddings": False,
            "vocab_size": 49155,
            "text_config": {
                "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "is_llama_config": True,
                "max_position_embeddings": 16384, "model_type": "llama", "num_attention_heads": 32,
                "num_key_value_heads": 32, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_interleaved": False,
                "rope_theta": 273768.0, "vocab_size": 49155,
            },
            "vision_config": {
                "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
                "max_image_size": {"longest_edge": 384}, "model_type": "idefics3", "num_attention_heads": 16,
                "num_hidden_layers": 27, "patch_size": 14, "tie_word_embeddings": False, "use_base_siglip": False,
            },
        },
    ),
    "OpenGVLab/InternVL3-1B-hf": Checkpoint(
        of="InternVLForConditionalGeneration", images=_square(448), heads=(14, 2),
        config={
            "downsample_ratio": 0.5, "image_seq_length": 256, "image_token_id": 151667, "model_type": "internvl",
            "projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
            "text_config": {
                "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 21, "model_type": "qwen2",
                "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
                "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
                "rope_theta": 1000000.0, "use_sliding_window": False, "vocab_size": 151674,
            },
            "vision_config": {
                "hidden_size": 1024, "image_size": [448, 448], "intermediate_size": 4096,
                "layer_scale_init_value": 0.1, "model_type": "internvl_vision", "norm_type": "layer_norm",
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": [14, 14],
                "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
                "use_qk_norm": False,
            },
        },
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": Checkpoint(
        of="Mistral3ForConditionalGeneration", images=_sized, heads=(32, 8),
        config={
            "image_token_index": 10, "model_type": "mistral3", "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu", "spatial_merge_size": 2, "vision_feature_layer": -1,
            "text_config": {
                "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 32768,
                "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
                "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072,
            },
            "vision_config": {
                "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540,
                "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16, "num_channels": 3,
                "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
            },
        },
    ),
    "mistral-community/pixtral-12b": Checkpoint(
        of="LlavaForConditionalGeneration", images=_pixtral, heads=(32, 8),
        config={
            "image_seq_length": 1, "image_token_index": 10, "model_type": "llava", "projector_hidden_act": "gelu",
            "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
            "text_config": {
                "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "is_composition": True,
                "max_position_embeddings": 1024000, "model_type": "mistral", "num_hidden_layers": 40,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None,
                "vocab_size": 131072,
            },
            "vision_config": {
                "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1024,
                "intermediate_size": 4096, "is_composition": True, "model_type": "pixtral",
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 16, "rope_theta": 10000.0,
            },
        },
    ),
    "CohereLabs/aya-vision-8b": Checkpoint(
        of="AyaVisionForConditionalGeneration", images=_square(364, 2), heads=(32, 8), tiles=2,
        config={
            "adapter_layer_norm_eps": 1e-06, "downsample_factor": 2, "image_token_index": 255036,
            "max_splits_per_img": 12, "model_type": "aya_vision", "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {
                "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
                "layer_norm_eps": 1e-05, "logit_scale": 0.25, "max_position_embeddings": 16384,
                "model_type": "cohere2", "num_attention_heads": 32, "num_hidden_layers": 32,
                "num_key_value_heads": 8, "order_of_interleaved_layers": "local_attn_first",
                "position_embedding_type": "rope_gptj", "rope_theta": 50000, "rotary_pct": 1.0,
                "sliding_window": 4096, "sliding_window_pattern": 4, "vocab_size": 256000,
            },
            "vision_config": {**_SIGLIP, "image_size": 364},
        },
    ),
    "LiquidAI/LFM2-VL-1.6B": Checkpoint(
        of="Lfm2VlForConditionalGeneration", images=_naflex, heads=(32, 8), layers=6, filters=(2, 5),
        config={
            "downsample_factor": 2, "image_token_id": 396, "model_type": "lfm2_vl", "projector_bias": True,
            "projector_hidden_act": "gelu", "projector_hidden_size": 2048, "projector_use_layernorm": False,
            "tie_word_embeddings": True,
            "text_config": {
                "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
                "conv_L_cache": 3, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048,
                "intermediate_size": 12288, "max_position_embeddings": 128000, "model_type": "lfm2",
                "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "vocab_size": 65536,
            },
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip2_vision_model",
                "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 27, "num_patches": 256,
                "patch_size": 16, "vision_use_head": False,
            },
        },
    ),
    "zai-org/GLM-4.1V-9B-Thinking": Checkpoint(
        of="Glm4vForConditionalGeneration", images=_grid(14), heads=(32, 2), types="mm_token_type_ids",
        config={
            "image_token_id": 151343, "video_token_id": 151344, "image_start_token_id": 151339,
            "image_end_token_id": 151340, "video_start_token_id": 151341, "video_end_token_id": 151342,
            "model_type": "glm4v", "tie_word_embeddings": False,
            "text_config": {
                "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338, 151348],
                "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13696,
                "max_position_embeddings": 65536, "model_type": "glm4v_text", "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329,
                "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
                "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}, "vocab_size": 151552,
            },
            "vision_config": {
                "attention_bias": False, "depth": 24, "hidden_act": "silu", "hidden_size": 1536, "image_size": 336,
                "in_channels": 3, "intermediate_size": 13696, "model_type": "glm4v", "num_heads": 12,
                "out_hidden_size": 4096, "patch_size": 14, "rms_norm_eps": 1e-05, "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
    ),
}
# fmt: on
