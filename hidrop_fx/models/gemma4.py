"""Gemma 4: tokens of an image or a video see each other both ways, in sliding layers alone and within the window.

Its encoder-free sibling (Gemma 4 Unified) has them so in every layer, beyond the window too.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.models.family import Blocks, Family
from hidrop_fx.models.forward_code import MASKS, WORDS
from hidrop_fx.ops.masks import run_blocks


def gemma4(family: Family) -> Family:
    return replace(
        family,
        configured=_configured,
        words=_padding_for_placeholders,
        inputs=family.inputs | {"mm_token_type_ids"},
        declares=family.declares | {MASKS, WORDS, "per_layer_inputs"},
    )


def gemma4_unified(family: Family) -> Family:
    return replace(gemma4(family), configured=_configured_unified)


def _configured(family: Family, config: Any) -> Family:
    return _checked(family, config, _VISION)


def _configured_unified(family: Family, config: Any) -> Family:
    return _checked(family, config, replace(_VISION, rule="beyond", layers=None))


def _checked(family: Family, config: Any, blocks: Blocks) -> Family:
    text = config.get_text_config()
    reason = None
    if getattr(text, "hidden_size_per_layer_input", 0):
        reason = (
            f"its layers add embeddings of their own to each token (hidden_size_per_layer_input="
            f"{text.hidden_size_per_layer_input}), which no pass cuts with the tokens"
        )
    elif text.num_kv_shared_layers:
        reason = (
            f"its last {text.num_kv_shared_layers} layers read the keys and values of earlier ones "
            "(num_kv_shared_layers), which hold other tokens once a schedule has dropped some"
        )
    elif text.use_bidirectional_attention == "all":
        reason = "all its tokens see each other both ways (use_bidirectional_attention='all'): an encoder"
    if reason is not None:
        raise UnsupportedModelError(
            f"this Gemma 4 cannot be scheduled: {reason}. Those without run, as gemma-4-31B and -26B-A4B"
        )
    if text.use_bidirectional_attention != "vision":
        return family
    return replace(family, blocks=blocks)


def _padding_for_placeholders(config: Any, ids: Tensor) -> Tensor:
    """Give the padding token for those of images, videos and sounds, also where the model has written one."""
    is_placeholder = (ids == config.image_token_id) | (ids == config.video_token_id)
    is_placeholder |= ids == config.audio_token_id
    return ids.masked_fill(is_placeholder, config.get_text_config().pad_token_id)


def _seen(types: Tensor) -> Tensor:
    return run_blocks((types == 1) | (types == 2))


_VISION = Blocks(
    argument="mm_token_type_ids", of=_seen, rule="within", layers=("sliding_attention",)
)
