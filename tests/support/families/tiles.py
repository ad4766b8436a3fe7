"""Classes that get an image as several tiles of the batch."""

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
    spaced_run,
    text_config,
)
from tests.support.families.towers import SIDE, anyres, siglip


def tiles_of(number: int) -> int:
    """Two tiles for every first, three for every second image."""
    return 2 + number % 2


def tiled(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    total = sum(tiles_of(number) for number in range(sum(counts)))
    return {"pixel_values": random_pixels(total, 3, SIDE, SIDE)}


def crops(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values": random_pixels(sum(counts), 2, 3, SIDE, SIDE)}


def crop_clips(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    return {"pixel_values_videos": random_pixels(sum(counts), 2, 3, SIDE, SIDE)}


def _internvl() -> Any:
    vision = hf.InternVLVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=(SIDE, SIDE), patch_size=(4, 4),
    )  # fmt: skip
    config = hf.InternVLConfig(
        text_config=text_config(hf.Qwen2Config), vision_config=vision, image_token_id=IMAGE_TOKEN,
        image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.InternVLForConditionalGeneration, config)


def _qianfan_ocr() -> Any:
    vision = hf.models.qianfan_ocr.QianfanOCRVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=(SIDE, SIDE), patch_size=(4, 4), drop_path_rate=0.0,
    )  # fmt: skip
    config = hf.QianfanOCRConfig(
        text_config=text_config(hf.Qwen3Config), vision_config=vision, image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
    )  # fmt: skip
    return random_model(hf.QianfanOCRForConditionalGeneration, config)


def _aria() -> Any:
    text = text_config(
        hf.AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, head_dim=8
    )
    vision = hf.Idefics3VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=4,
    )  # fmt: skip
    config = hf.AriaConfig(
        text_config=text, vision_config=vision.to_dict(), image_token_index=IMAGE_TOKEN,
        projector_patch_to_query_dict={16: 5},
    )  # fmt: skip
    return random_model(hf.AriaForConditionalGeneration, config)


def _got_ocr2() -> Any:
    vision = hf.models.got_ocr2.GotOcr2VisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=64,
        patch_size=4, window_size=4, global_attn_indexes=(1,), mlp_dim=24,
    )  # fmt: skip
    config = hf.GotOcr2Config(
        text_config=text_config(hf.Qwen2Config), vision_config=vision, image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.GotOcr2ForConditionalGeneration, config)


def _large_tiles(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    total = sum(tiles_of(number) for number in range(sum(counts)))
    return {"pixel_values": random_pixels(total, 3, 64, 64)}


def _aya_vision() -> Any:
    config = hf.AyaVisionConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=siglip(), image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.AyaVisionForConditionalGeneration, config)


def _cohere2_vision() -> Any:
    config = hf.Cohere2VisionConfig(
        text_config=text_config(hf.Qwen3Config), vision_config=siglip(), image_token_id=IMAGE_TOKEN,
        alignment_intermediate_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Cohere2VisionForConditionalGeneration, config)


def _cohere2_text() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return text_config(hf.Cohere2Config, sliding_window=5, layer_types=kinds, logit_scale=0.5)


def _aya_vision_cohere2() -> Any:
    config = hf.AyaVisionConfig(
        text_config=_cohere2_text(), vision_config=siglip(), image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.AyaVisionForConditionalGeneration, config)


def _cohere2_vision_cohere2() -> Any:
    config = hf.Cohere2VisionConfig(
        text_config=_cohere2_text(), vision_config=siglip(), image_token_id=IMAGE_TOKEN,
        alignment_intermediate_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Cohere2VisionForConditionalGeneration, config)


def _perception_lm() -> Any:
    """Over a tower of transformers' own; its checkpoints have one of timm's."""
    config = hf.PerceptionLMConfig(
        text_config=text_config(hf.LlamaConfig), vision_config=siglip(model_args={"embed_dim": 16}),
        image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_use_cls_token=False,
        projector_pooling_ratio=2,
    )  # fmt: skip
    return random_model(hf.PerceptionLMForConditionalGeneration, config)


def two_entries(number: int) -> int:
    return 2


def with_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Every second image with two patches of its own beside it."""
    numbers = [2 * (k % 2) for k in range(sum(counts))]
    given = {"pixel_values": random_pixels(len(numbers), 3, 64, 64)}
    if sum(numbers):
        given["pixel_values_local"] = random_pixels(sum(numbers), 3, 64, 64)
    return {**given, "num_local_patches": torch.tensor(numbers)}


def _deepseek_ocr2() -> Any:
    """With five queries an image in the place of 144."""
    sam = {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 24, "downsample_channels": [8, 16],
    }  # fmt: skip
    encoder = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    text = text_config(
        hf.DeepseekOcr2TextConfig, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        n_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"],
    )  # fmt: skip
    config = hf.DeepseekOcr2Config(
        text_config=text.to_dict(), vision_config={"sam_config": sam, "encoder_config": encoder},
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    model = random_model(hf.DeepseekOcr2ForConditionalGeneration, config)
    tower = model.model.vision_tower
    queries = tower.query_768_resolution.weight[:5].detach().clone()
    tower.query_768_resolution = torch.nn.Embedding.from_pretrained(queries, freeze=False)
    return model


def step3p7() -> Any:
    """Sliding layers have fewer heads; the first layer has no experts, those of others are called in a loop."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = text_config(
        hf.models.step3p7.Step3p7TextConfig, sliding_window=5, layer_types=kinds, num_sliding_attention_heads=2,
        mlp_layer_types=["dense", "sparse", "sparse"], num_experts_per_tok=2, n_routed_experts=4,
        moe_intermediate_size=16, share_expert_dim=16,
    )  # fmt: skip
    vision = hf.models.step3p7.Step3p7VisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4, mlp_ratio=1.5,
    )  # fmt: skip
    config = hf.Step3p7Config(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return random_model(hf.Step3p7ForConditionalGeneration, config)


def _granite4_vision() -> Any:
    qformer = {
        "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 24,
        "cross_attention_frequency": 1, "max_position_embeddings": 64, "use_qformer_text_input": False,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "hidden_size": 64, "num_attention_heads": 1, "encoder_hidden_size": 64,  # the tower's
    }  # fmt: skip
    text = text_config(
        hf.Granite4VisionTextConfig, embedding_multiplier=1.5, logits_scaling=2.0,
        residual_multiplier=0.8, attention_multiplier=0.4,
    )  # fmt: skip
    config = hf.Granite4VisionConfig(
        text_config=text.to_dict(), vision_config=siglip(hidden_size=64).to_dict(),
        qformer_config=qformer, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=[[16, 32], [32, 16]],
        downsample_rate="1/2", deepstack_layer_map=[[0, 0], [1, 1]], spatial_vision_layer=-1,
        spatial_target_layers=[2], projector_dropout=0.0, vision_feature_select_strategy="full",
    )  # fmt: skip
    return random_model(hf.Granite4VisionForConditionalGeneration, config)


def _halved(rows: Tensor) -> Tensor:
    return rows / 2


def _ovis2() -> Any:
    vision = hf.models.ovis2.Ovis2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=4, vocab_size=24, hidden_stride=2,
    )  # fmt: skip
    config = hf.Ovis2Config(
        text_config=text_config(hf.Qwen2Config), vision_config=vision, image_token_id=IMAGE_TOKEN,
        visual_indicator_token_ids=[92, 93, 90, 94, 95], vocab_size=120, hidden_size=32,
    )  # fmt: skip
    return random_model(hf.Ovis2ForConditionalGeneration, config)


TILED = (
    Case(name="internvl", make=_internvl, images=tiled, entries=tiles_of),
    Case(name="aria", make=_aria, images=tiled, entries=tiles_of),
    Case(name="qianfan_ocr", make=_qianfan_ocr, images=tiled, entries=tiles_of),
    Case(name="got_ocr2", make=_got_ocr2, images=_large_tiles, entries=tiles_of),
    Case(name="aya_vision", make=_aya_vision, images=tiled, entries=tiles_of, ids=spaced_run),
    Case(
        name="cohere2_vision", make=_cohere2_vision, images=tiled, entries=tiles_of, ids=spaced_run
    ),
    Case(
        name="aya_vision_cohere2",
        make=_aya_vision_cohere2,
        images=tiled,
        entries=tiles_of,
        ids=spaced_run,
    ),
    Case(
        name="cohere2_vision_cohere2",
        make=_cohere2_vision_cohere2,
        images=tiled,
        entries=tiles_of,
        ids=spaced_run,
    ),
    Case(
        name="granite4_vision",
        make=_granite4_vision,
        images=anyres,
        deepstack="inputs",
        logits=_halved,
    ),
    Case(
        name="perception_lm",
        make=_perception_lm,
        images=crops,
        videos=crop_clips,
        entries=two_entries,
        frames=2,
    ),
    Case(
        name="deepseek_ocr2",
        make=_deepseek_ocr2,
        images=with_patches,
        resized=("model.vision_tower.query_768_resolution.weight",),
    ),
    Case(name="ovis2", make=_ovis2, images=tiled, entries=tiles_of, ids=spaced_run),
)
