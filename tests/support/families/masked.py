"""Classes whose masks are not causal alone: tokens of an image, or of a prefix, see each other both ways."""

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
    causal,
    random_model,
    random_pixels,
    text_config,
)
from tests.support.families.towers import siglip, square

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 5
SOUND_TOKEN = 112


def image_types(ids: Sequence[int], kinds: Sequence[int]) -> list[int]:
    return list(kinds)


def same_run(types: Sequence[int], query: int, key: int) -> bool:
    """Both in one run of vision tokens."""
    low, high = sorted((query, key))
    return all(types[place] > 0 for place in range(low, high + 1))


def image_within_window(types: Sequence[int], query: int, key: int, window: int | None) -> bool:
    """Gemma 3: an image both ways, never further back than the window."""
    if window is not None and query - key >= window:
        return False
    return key <= query or same_run(types, query, key)


def _gemma3() -> Any:
    text = text_config(
        hf.Gemma3TextConfig, sliding_window=WINDOW, layer_types=SLIDING, query_pre_attn_scalar=8,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=siglip(), image_token_id=IMAGE_TOKEN, mm_tokens_per_image=4,
        boi_token_index=90, eoi_token_index=91, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Gemma3ForConditionalGeneration, config)


def prefix_types(ids: Sequence[int], kinds: Sequence[int]) -> list[int]:
    """The last word is the answer."""
    return [0] * (len(ids) - 1) + [1]


def prefix_beyond_window(types: Sequence[int], query: int, key: int, window: int | None) -> bool:
    """PaliGemma: the prefix both ways, whatever the window."""
    return (types[query] == 0 and types[key] == 0) or causal(types, query, key, window)


def _paligemma(text: Any) -> Any:
    text._attn_implementation = "eager"
    config = hf.PaliGemmaConfig(
        text_config=text, vision_config=siglip(), image_token_index=IMAGE_TOKEN, projection_dim=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.PaliGemmaForConditionalGeneration, config)


def _paligemma1() -> Any:
    return _paligemma(text_config(hf.GemmaConfig))


def _paligemma2() -> Any:
    text = text_config(
        hf.Gemma2Config, sliding_window=WINDOW, layer_types=SLIDING, query_pre_attn_scalar=8,
        attn_logit_softcapping=4.0, final_logit_softcapping=3.0,
    )  # fmt: skip
    return _paligemma(text)


def capped(logits: Tensor) -> Tensor:
    return 3.0 * torch.tanh(logits / 3.0)


def _prefix_case(**more: Any) -> Case:
    return Case(
        images=square,
        token_types=prefix_types,
        new_type=1,
        type_input="token_type_ids",
        sees=prefix_beyond_window,
        first_position=1,
        **more,
    )


def images_beyond_window(types: Sequence[int], query: int, key: int, window: int | None) -> bool:
    """Molmo 2: all images of a row both ways."""
    return (types[query] == 1 and types[key] == 1) or causal(types, query, key, window)


def pooled(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Images of one crop, pooled to 4 tokens, and of a second one, with 2 more."""
    pooling: list[list[int]] = []
    grids, crops = [], 0
    for number in range(sum(counts)):
        for corners in ((0, 2, 8, 10), (0, 10))[: 1 + number % 2]:
            starts = [crops * 16 + corner for corner in corners]
            pooling += [[start, start + 1, start + 4, start + 5] for start in starts]
            crops += 1
        grids.append([2, 2, 1, 2] if number % 2 else [2, 2, 0, 0])
    return {
        "pixel_values": random_pixels(crops, 16, 48),
        "image_token_pooling": torch.tensor(pooling),
        "image_grids": torch.tensor(grids),
    }


def pooled_frames(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Videos of two frames, two tokens each."""
    number = sum(counts)
    starts = [crop * 16 + corner for crop in range(2 * number) for corner in (0, 10)]
    return {
        "pixel_values_videos": random_pixels(2 * number, 16, 48),
        "video_token_pooling": torch.tensor([[s, s + 1, s + 4, s + 5] for s in starts]),
        "video_grids": torch.tensor([[2, 1, 2]] * number),
    }


def _molmo2() -> Any:
    text = text_config(
        hf.Molmo2TextConfig, additional_vocab_size=8, rope_scaling_layers=[1],
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    )  # fmt: skip
    vision = hf.Molmo2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, image_size=[16, 16], patch_size=4,
    )  # fmt: skip
    adapter = hf.Molmo2AdapterConfig(
        vision_feature_layer=[1, 0], hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=24, text_hidden_size=32,
    )  # fmt: skip
    config = hf.Molmo2Config(
        text_config=text, vision_config=vision, adapter_config=adapter, image_patch_id=IMAGE_TOKEN,
    )  # fmt: skip
    return random_model(hf.Molmo2ForConditionalGeneration, config)


def image_in_sliding_layers(types: Sequence[int], query: int, key: int, window: int | None) -> bool:
    """Gemma 4: as Gemma 3 where there is a window, and causal elsewhere."""
    if window is None:
        return key <= query
    return image_within_window(types, query, key, window)


def padded_patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Images of 4 x 4 patches, and of 4 x 2 with padding behind."""
    places = torch.full((sum(counts), 16, 2), -1)
    for number in range(sum(counts)):
        columns = 2 if number % 2 else 4
        found = [[x, y] for y in range(4) for x in range(columns)]
        places[number, : len(found)] = torch.tensor(found)
    return {
        "pixel_values": random_pixels(sum(counts), 16, 48),
        "image_position_ids": places,
    }


def padded_frames(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Videos of two frames, the second one padded."""
    return _as_videos(padded_patches(model, [2 * sum(counts)]))


def _as_videos(images: dict[str, Any]) -> dict[str, Any]:
    frames = images["pixel_values"]
    return {
        "pixel_values_videos": frames.flip(0),
        "video_position_ids": images["image_position_ids"],
        "num_frames_per_video": torch.full((len(frames) // 2,), 2),
    }


def _gemma4(**more: Any) -> Any:
    text = text_config(
        hf.Gemma4TextConfig, sliding_window=WINDOW, global_head_dim=16, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        use_bidirectional_attention="vision", final_logit_softcapping=3.0,
        **more,
    )  # fmt: skip
    vision = hf.Gemma4VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=16,
    )  # fmt: skip
    config = hf.Gemma4Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN,
        audio_token_id=SOUND_TOKEN, boi_token_id=90, eoi_token_id=91, boa_token_id=92, eoa_token_index=93,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Gemma4ForConditionalGeneration, config)


def _gemma4_shared_values() -> Any:
    """As gemma-4-26B-A4B: full layers with one projection for keys and values, experts."""
    return _gemma4(
        attention_k_eq_v=True, num_global_key_value_heads=1, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=16,
    )  # fmt: skip


def _gemma4_case(**more: Any) -> Case:
    return Case(
        images=padded_patches,
        videos=padded_frames,
        token_types=image_types,
        sees=image_in_sliding_layers,
        logits=capped,
        silent=(IMAGE_TOKEN, VIDEO_TOKEN, SOUND_TOKEN),
        **more,
    )


def image_beyond_window(types: Sequence[int], query: int, key: int, window: int | None) -> bool:
    """Gemma 4 Unified: an image both ways, whatever the window."""
    return same_run(types, query, key) or causal(types, query, key, window)


def patches(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    """Images of 3 x 2 patches, and of 2 x 2 with padding behind."""
    places = torch.full((sum(counts), 6, 2), -1)
    for number in range(sum(counts)):
        found = [[x, y] for y in range(2) for x in range(3 - number % 2)]
        places[number, : len(found)] = torch.tensor(found)
    return {
        "pixel_values": random_pixels(sum(counts), 6, 48),
        "image_position_ids": places,
    }


def frames(model: Any, counts: Sequence[int]) -> dict[str, Any]:
    return _as_videos(patches(model, [2 * sum(counts)]))


def _gemma4_unified() -> Any:
    text = text_config(
        hf.Gemma4UnifiedTextConfig, sliding_window=WINDOW, global_head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=3.0, num_global_key_value_heads=1,
    )  # fmt: skip
    vision = hf.Gemma4UnifiedVisionConfig(
        patch_size=2, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=8, output_proj_dims=16,
    )  # fmt: skip
    config = hf.Gemma4UnifiedConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN,
        audio_token_id=SOUND_TOKEN, boi_token_id=90, eoi_token_id=91, boa_token_id=92, eoa_token_index=93,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(hf.Gemma4UnifiedForConditionalGeneration, config)


MASKED = (
    Case(
        name="gemma4_unified",
        make=_gemma4_unified,
        images=patches,
        videos=frames,
        token_types=image_types,
        sees=image_beyond_window,
        logits=capped,
        silent=(IMAGE_TOKEN, VIDEO_TOKEN, SOUND_TOKEN),
    ),
    _gemma4_case(name="gemma4", make=_gemma4),
    _gemma4_case(name="gemma4_moe", make=_gemma4_shared_values),
    Case(
        name="molmo2",
        make=_molmo2,
        images=pooled,
        videos=pooled_frames,
        same_token=True,
        one_kind=True,
        token_types=image_types,
        sees=images_beyond_window,
        adds_features=True,
        filler=IMAGE_TOKEN,
    ),
    _prefix_case(name="paligemma", make=_paligemma1),
    _prefix_case(name="paligemma2", make=_paligemma2, logits=capped),
    Case(
        name="gemma3",
        make=_gemma3,
        images=square,
        token_types=image_types,
        type_input="token_type_ids",
        sees=image_within_window,
    ),
)
