"""Classes beyond Qwen's and GLM's whose images are flat patches with a grid (time, height, width)."""

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
from tests.support.families.grids import (
    MROPE,
    TOKENS,
    deepstack_vision,
    grids_of,
    patches,
    square_patches,
    video_patches,
    vision,
)
from tests.support.families.masked import capped

_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_MEDIA: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
_SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 4,
}  # fmt: skip


def _hyperclovax() -> Any:
    text = text_config(
        hf.HyperCLOVAXConfig, embedding_multiplier=1.5, logits_scaling=0.5, residual_multiplier=0.8,
        attention_multiplier=0.4,
    )  # fmt: skip
    tower = hf.Qwen2_5_VLConfig(
        vision_config=vision(window_size=16, fullatt_block_indexes=[1])
    ).vision_config
    config = hf.HyperCLOVAXVisionV2Config(
        text_config=text, vision_config=tower, tie_word_embeddings=False, **_MEDIA
    )
    return random_model(hf.HyperCLOVAXVisionV2ForConditionalGeneration, config)


def _halved(rows: Tensor) -> Tensor:
    return rows * 0.5


def _muse_text(cls: Any, **more: Any) -> Any:
    return text_config(
        cls, sliding_window=6, layer_types=_KINDS, layer_rope_theta=[10000.0, 0, 10000.0],
        final_logit_softcapping=3.0, output_multiplier=1.0, **more,
    )  # fmt: skip


def _muse_parts() -> dict[str, Any]:
    return {"out_hidden_size": 64, "projector_hidden_size": 24, **_MEDIA}


def _muse_glimmer() -> Any:
    tower = hf.MuseGlimmerVisionConfig(pos_emb_height=4, pos_emb_width=4, **_SMALL)
    config = hf.MuseGlimmerConfig(
        text_config=_muse_text(hf.MuseGlimmerTextConfig), vision_config=tower, **_muse_parts()
    )
    return random_model(hf.MuseGlimmerForConditionalGeneration, config)


def _muse_spark() -> Any:
    tower = hf.MuseSparkVisionConfig(pos_emb_height=4, pos_emb_width=4, **_SMALL)
    text = _muse_text(
        hf.MuseSparkTextConfig, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        moe_hidden_size=16,
    )  # fmt: skip
    sound = hf.MuseSparkAudioConfig(
        patch_sizes=[2, 2],
        hidden_sizes=[4, 8],
        depths=[1, 1],
        num_hidden_layers=2,
        out_hidden_size=32,
    )
    config = hf.MuseSparkConfig(
        text_config=text,
        vision_config=tower,
        audio_config=sound,
        audio_token_id=112,
        **_muse_parts(),
    )
    return random_model(hf.MuseSparkForConditionalGeneration, config)


def flat_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor(grids_of(sum(counts)))
    return {"pixel_values": random_pixels(int(grids.prod(1).sum()), 48), "image_grid_thw": grids}


def flat_video_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    grids = torch.tensor(grids_of(sum(counts), time=2))
    return {
        "pixel_values_videos": random_pixels(int(grids.prod(1).sum()), 48),
        "video_grid_thw": grids,
    }


def _cosmos3_edge() -> Any:
    tower = hf.Cosmos3EdgeVisionConfig(num_patches=16, **_SMALL)
    config = hf.Cosmos3EdgeConfig(
        text_config=text_config(hf.Cosmos3EdgeTextConfig, rope_parameters=MROPE), vision_config=tower,
        projector_hidden_size=24, **TOKENS,
    )  # fmt: skip
    return random_model(hf.Cosmos3EdgeForConditionalGeneration, config)


def _cosmos3_omni() -> Any:
    text = text_config(hf.Qwen3VLTextConfig, rope_parameters=MROPE)
    config = hf.Cosmos3OmniConfig(
        text_config=text.to_dict(), vision_config=deepstack_vision(), **TOKENS
    )
    return random_model(hf.Cosmos3OmniForConditionalGeneration, config)


def _cohere_compass() -> Any:
    text = text_config(
        hf.CohereCompassTextConfig, sliding_window=6, layer_types=_KINDS, logit_scale=0.5,
        rope_parameters={"sliding_attention": MROPE, "full_attention": None},
    )  # fmt: skip
    config = hf.CohereCompassConfig(
        text_config=text.to_dict(), vision_config=deepstack_vision(), **TOKENS
    )
    return random_model(hf.CohereCompassForConditionalGeneration, config)


def _hunyuan_vl() -> Any:
    """With its checkpoint's RoPE: called dynamic, of frequencies that do not change."""
    rope = {
        "rope_type": "dynamic", "alpha": 8.0, "factor": 1.0, "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1],
    }  # fmt: skip
    text = text_config(hf.HunYuanVLTextConfig, rope_parameters=rope)
    tower = hf.HunYuanVLVisionConfig(
        **_SMALL, out_hidden_size=32, text_hidden_size=32, max_image_size=16, min_image_size=4
    )
    config = hf.HunYuanVLConfig(
        text_config=text.to_dict(), vision_config=tower.to_dict(), image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.HunYuanVLForConditionalGeneration, config)


def _kimi_k25() -> Any:
    text = text_config(
        hf.DeepseekV3Config, n_routed_experts=4, n_group=2, topk_group=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, head_dim=8,
        first_k_dense_replace=1, num_key_value_heads=4, num_experts_per_tok=2, moe_intermediate_size=24,
    )  # fmt: skip
    tower = hf.Kimi_K25VisionConfig(pos_emb_height=4, pos_emb_width=4, **_SMALL)
    config = hf.Kimi_K25Config(
        text_config=text, vision_config=tower, projection_hidden_size=16, tie_word_embeddings=False,
        **_MEDIA,
    )  # fmt: skip
    return random_model(hf.Kimi_K25ForConditionalGeneration, config)


def _glm4v_moe() -> Any:
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    text = text_config(
        hf.Glm4vMoeTextConfig, rope_parameters=rope, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24,
    )  # fmt: skip
    config = hf.Glm4vMoeConfig(
        text_config=text.to_dict(), vision_config=vision(image_size=16), image_start_token_id=100,
        image_end_token_id=101, video_start_token_id=102, video_end_token_id=103, **TOKENS,
    )  # fmt: skip
    return random_model(hf.Glm4vMoeForConditionalGeneration, config)


def _qwen2_5_omni() -> Any:
    classes = hf.models.qwen2_5_omni
    text = text_config(
        classes.configuration_qwen2_5_omni.Qwen2_5OmniTextConfig, rope_parameters=MROPE
    )
    sound = {
        "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
        "num_mel_bins": 8, "output_dim": 32, "max_source_positions": 20, "n_window": 5,
    }  # fmt: skip
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config=text.to_dict(), vision_config=vision(window_size=16, fullatt_block_indexes=[1]),
        audio_config=sound, audio_token_id=112, audio_start_token_id=104, audio_end_token_id=105, **TOKENS,
    )  # fmt: skip
    return random_model(hf.Qwen2_5OmniThinkerForConditionalGeneration, config)


def _qwen3_omni() -> Any:
    classes = hf.models.qwen3_omni_moe.configuration_qwen3_omni_moe
    text = text_config(
        classes.Qwen3OmniMoeTextConfig, rope_parameters=MROPE, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24,
    )  # fmt: skip
    sound = {
        "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16,
        "num_mel_bins": 8, "output_dim": 32, "max_source_positions": 20, "n_window": 5, "downsample_hidden_size": 8,
    }  # fmt: skip
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config=text.to_dict(), vision_config=deepstack_vision(), audio_config=sound, audio_token_id=112,
        audio_start_token_id=104, audio_end_token_id=105, **TOKENS,
    )  # fmt: skip
    return random_model(hf.Qwen3OmniMoeThinkerForConditionalGeneration, config)


def bracketed(lengths: Sequence[int], token: int) -> list[int]:
    """A word before, by which the class finds its items, and one behind."""
    return [100, *[token] * sum(lengths), 101]


def timed_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    seconds = torch.full((sum(counts),), 0.04)
    return {**video_patches(model, counts), "video_second_per_grid": seconds}


_QWEN: dict[str, Any] = {"images": patches, "videos": video_patches}
_SILENT = (IMAGE_TOKEN, VIDEO_TOKEN)

# fmt: off
OTHER_GRIDS = (
    Case(name="hyperclovax_vision_v2", make=_hyperclovax, logits=_halved, **_QWEN),
    Case(name="muse_glimmer", make=_muse_glimmer, logits=capped, silent=_SILENT, **_QWEN),
    Case(name="muse_spark", make=_muse_spark, logits=capped, silent=(*_SILENT, 112), **_QWEN),
    Case(name="kimi_k25", make=_kimi_k25, images=square_patches, silent=_SILENT),
    Case(
        name="cosmos3_edge", make=_cosmos3_edge, images=flat_patches, videos=flat_video_patches,
        video_ids=two_frames, typed=True,
    ),
    Case(
        name="cosmos3_omni", make=_cosmos3_omni, video_ids=two_frames, typed=True, deepstack="behind", **_QWEN
    ),
    Case(
        name="cohere_compass", make=_cohere_compass, video_ids=two_frames, typed=True,
        deepstack="behind", logits=_halved, **_QWEN,
    ),
    Case(
        name="qwen2_5_omni_thinker", make=_qwen2_5_omni, images=patches, videos=timed_patches, ids=bracketed,
        video_ids=bracketed,
    ),
    Case(
        name="qwen3_omni_moe_thinker", make=_qwen3_omni, images=patches, videos=timed_patches, ids=bracketed,
        video_ids=bracketed, deepstack="behind",
    ),
    Case(name="hunyuan_vl", make=_hunyuan_vl, images=flat_patches, typed=True),
    Case(
        name="glm4v_moe", make=_glm4v_moe, video_ids=two_frames, typed=True, same_token=True, one_kind=True,
        **_QWEN,
    ),
)
# fmt: on
