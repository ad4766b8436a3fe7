"""Other families than LLaVA at the sizes of `geometries.py`: the same decoder widths, as small a tower as can be.

model = families.build("qwen2_5_vl", SIZES["16x2048"])
inputs = families.prompt("qwen2_5_vl", model, batch=1, vision_tokens=576, text_tokens=64)
"""

import math
from collections.abc import Callable
from typing import Any

import geometries
import torch
import transformers as hf
from geometries import IMAGE_TOKEN, PATCH, Size

WINDOW = 1024
"""Of Gemma 3's sliding layers, five of six."""


def build(family: str, size: Size, device: str = "cpu") -> Any:
    """Build a model of a family with random weights, in eval mode."""
    made, config = CONFIGS[family](size)
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            return made(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompt(
    family: str, model: Any, *, batch: int, vision_tokens: int, text_tokens: int
) -> dict[str, Any]:
    """Make inputs with ready image features, as `generate` passes them to forward."""
    shape = {"batch": batch, "vision_tokens": vision_tokens, "text_tokens": text_tokens}
    inputs: dict[str, Any] = geometries.prompt(model, **shape)
    places = (inputs["input_ids"] == model.config.image_token_id).long()
    if family == "gemma3":
        inputs["token_type_ids"] = places
        image = inputs["mm_encoder_outputs"]["image"]
        image.pooler_output = torch.stack(image.pooler_output)
    if family == "qwen2_5_vl":
        down = max(n for n in range(1, math.isqrt(vision_tokens) + 1) if vision_tokens % n == 0)
        grid = torch.tensor([[1, 2 * down, 2 * vision_tokens // down]], device=model.device)
        inputs["position_ids"], _ = model.model.get_rope_index(
            inputs["input_ids"], places, image_grid_thw=grid.expand(batch, -1)
        )
    return inputs


def _text(size: Size, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _qwen2_5_vl(size: Size) -> tuple[Any, Any]:
    half = size.width // size.heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH,
        "out_hidden_size": size.width, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = hf.Qwen2_5_VLConfig(
        text_config=_text(size, rope_parameters=rope), vision_config=vision,
        image_token_id=IMAGE_TOKEN, video_token_id=IMAGE_TOKEN + 1,
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration, config


def _llava_next(size: Size) -> tuple[Any, Any]:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=geometries.IMAGE_SIZE, patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        text_config=hf.LlamaConfig(**_text(size)), vision_config=vision, image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration, config


def _gemma3(size: Size) -> tuple[Any, Any]:
    text = _text(size, head_dim=size.width // size.heads, sliding_window=WINDOW)
    text["query_pre_attn_scalar"] = text["head_dim"]
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": geometries.IMAGE_SIZE, "patch_size": PATCH,
    }  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, mm_tokens_per_image=144,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration, config


CONFIGS: dict[str, Callable[[Size], tuple[Any, Any]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_next": _llava_next,
    "gemma3": _gemma3,
}
"""Family -> its class and its config at a size."""
