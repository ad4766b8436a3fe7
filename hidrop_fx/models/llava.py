"""LLaVA 1.5: a CLIP-like tower, a two-layer projector, every image the same number of tokens."""

from typing import Any

from torch import Tensor
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
)

from hidrop_fx.models.family import Family

_IMAGE_INPUTS = (
    "pixel_values",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_sizes",
)


def _encode_images(base: Any, inputs: dict[str, Any]) -> list[Tensor]:
    given = {name: inputs[name] for name in _IMAGE_INPUTS if inputs.get(name) is not None}
    return list(base.get_image_features(**given, return_dict=True).pooler_output)


LLAVA = Family(
    placeholder=lambda config: config.image_token_id,
    encode_images=_encode_images,
    pixels="pixel_values",
    base_output=LlavaModelOutputWithPast,
    output=LlavaCausalLMOutputWithPast,
)
