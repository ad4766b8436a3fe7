"""Classes whose features are one entry an image: LLaVA's nearest relatives, and those over Pixtral."""

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

SIDE, PATCH = 16, 4


def clip(**more: Any) -> Any:
    return hf.CLIPVisionConfig(
        **{
            "hidden_size": 16, "intermediate_size": 24, "projection_dim": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, **more,
        }
    )  # fmt: skip


def siglip(**more: Any) -> Any:
    return hf.SiglipVisionConfig(
        **{
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False, **more,
        }
    )  # fmt: skip


def pixtral() -> Any:
    return hf.PixtralVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        head_dim=8, image_size=32, patch_size=PATCH,
    )  # fmt: skip


def square(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values": random_pixels(sum(counts), 3, SIDE, SIDE)}


def sized(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Images of two sizes, padded to the larger."""
    sizes = [((16, 24) if k % 2 else (16, 16)) for k in range(sum(counts))]
    return {
        "pixel_values": random_pixels(sum(counts), 3, 16, 24 if sum(counts) > 1 else 16),
        "image_sizes": torch.tensor(sizes),
    }


def anyres(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Three tiles an image (a 16 x 32 grid of two, and the base), of two original sizes."""
    sizes = [((16, 32) if k % 2 else (12, 30)) for k in range(sum(counts))]
    return {
        "pixel_values": random_pixels(sum(counts), 3, 3, SIDE, SIDE),
        "image_sizes": torch.tensor(sizes),
    }


def clips(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values_videos": random_pixels(sum(counts), 2, 3, SIDE, SIDE)}


def _llava() -> Any:
    config = hf.LlavaConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=clip(),
        image_token_index=IMAGE_TOKEN, image_seq_length=16,
    )  # fmt: skip
    return random_model(hf.LlavaForConditionalGeneration, config)


def _llava_pixtral() -> Any:
    config = hf.LlavaConfig(
        text_config=text_config(hf.MistralConfig, sliding_window=None), vision_config=pixtral(),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return random_model(hf.LlavaForConditionalGeneration, config)


def _vipllava() -> Any:
    config = hf.VipLlavaConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=clip(num_hidden_layers=3),
        image_token_index=IMAGE_TOKEN, vision_feature_layers=[-2, -1],
    )  # fmt: skip
    return random_model(hf.VipLlavaForConditionalGeneration, config)


def _llava_next() -> Any:
    config = hf.LlavaNextConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=clip(),
        image_token_index=IMAGE_TOKEN, image_grid_pinpoints=[[16, 32], [32, 16]],
    )  # fmt: skip
    return random_model(hf.LlavaNextForConditionalGeneration, config)


def _llava_next_video() -> Any:
    config = hf.LlavaNextVideoConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=clip(),
        image_token_index=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[16, 32], [32, 16]], spatial_pool_mode="average", spatial_pool_stride=2,
    )  # fmt: skip
    return random_model(hf.LlavaNextVideoForConditionalGeneration, config)


def _llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        text_config=text_config(hf.Qwen2Config), vision_config=siglip(),
        image_token_index=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )  # fmt: skip
    return random_model(hf.LlavaOnevisionForConditionalGeneration, config)


def _video_llava() -> Any:
    config = hf.VideoLlavaConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=clip(),
        image_token_index=IMAGE_TOKEN, video_token_index=VIDEO_TOKEN,
    )  # fmt: skip
    return random_model(hf.VideoLlavaForConditionalGeneration, config)


def _mistral3() -> Any:
    config = hf.Mistral3Config(
        text_config=text_config(hf.MistralConfig, sliding_window=None), vision_config=pixtral(),
        image_token_index=IMAGE_TOKEN, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Mistral3ForConditionalGeneration, config)


def _lighton_ocr() -> Any:
    config = hf.LightOnOcrConfig(
        text_config=text_config(hf.Qwen3Config), vision_config=pixtral(), image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.LightOnOcrForConditionalGeneration, config)


def _deepseek_vl() -> Any:
    config = hf.DeepseekVLConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=siglip(), image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.DeepseekVLForConditionalGeneration, config)


def _deepseek_vl_hybrid() -> Any:
    sam = hf.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=64,
        patch_size=4, window_size=4, global_attn_indexes=[1], mlp_dim=24,
    )  # fmt: skip
    config = hf.DeepseekVLHybridConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=siglip(), image_token_id=IMAGE_TOKEN,
        high_res_vision_config=sam,
    )  # fmt: skip
    return random_model(hf.DeepseekVLHybridForConditionalGeneration, config)


def two_resolutions(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    high = random_pixels(sum(counts), 3, 64, 64)
    return {**square(model, counts), "high_res_pixel_values": high}


def _janus() -> Any:
    vision = hf.JanusVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
        mlp_ratio=2.0, projection_dim=32, depth=2, num_image_tokens=16,
    )  # fmt: skip
    vq = hf.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=8, latent_channels=8, base_channels=32, channel_multiplier=(1, 1),
        num_res_blocks=1, num_patches=4, projection_dim=32, num_hidden_layers=2, image_token_embed_dim=32,
    )  # fmt: skip
    config = hf.JanusConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=vision, vq_config=vq,
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.JanusForConditionalGeneration, config)


def _fast_vlm() -> Any:
    """Over a tower of transformers' own; its checkpoints have one of timm's."""
    tower = hf.ConvNextConfig(
        num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], patch_size=PATCH, image_size=SIDE, hidden_size=16,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    config = hf.FastVlmConfig(
        text_config=text_config(hf.Qwen2Config), vision_config=tower, image_token_id=IMAGE_TOKEN
    )
    return random_model(hf.FastVlmForConditionalGeneration, config)


def _fuyu() -> Any:
    config = hf.FuyuConfig(
        text_config=text_config(
            hf.PersimmonConfig, hidden_dropout=0.0, attention_dropout=0.0, qk_layernorm=True
        ),
        patch_size=PATCH, image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.FuyuForCausalLM, config)


def raw_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values": random_pixels(sum(counts), 4, 3 * PATCH * PATCH)}


SIMPLE = (
    Case(name="fast_vlm", make=_fast_vlm, images=square),
    Case(name="fuyu", make=_fuyu, images=raw_patches),
    Case(name="llava", make=_llava, images=square),
    Case(name="llava_pixtral", make=_llava_pixtral, images=sized),
    Case(name="vipllava", make=_vipllava, images=square),
    Case(name="llava_next", make=_llava_next, images=anyres),
    Case(name="llava_next_video", make=_llava_next_video, images=anyres, videos=clips),
    Case(name="llava_onevision", make=_llava_onevision, images=anyres, videos=clips),
    Case(name="video_llava", make=_video_llava, images=square, videos=clips, frames=2),
    Case(name="mistral3", make=_mistral3, images=sized),
    Case(name="lighton_ocr", make=_lighton_ocr, images=sized),
    Case(name="deepseek_vl", make=_deepseek_vl, images=square),
    Case(name="deepseek_vl_hybrid", make=_deepseek_vl_hybrid, images=two_resolutions),
    Case(name="janus", make=_janus, images=square),
)
