"""Model families and text backbones: what differs between them, and how it is read off a class.

A *family* says how a VLM class takes images and videos, and what it does around its text decoder; a
*backbone* says which masks that decoder wants. A family is inferred from the class
(`hidrop_fx.models.inferred`); a file here exists where a class departs from what HF's classes share.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.models.backbone import BACKBONES, Backbone, infer_backbone
from hidrop_fx.models.deepstack import with_deepstack
from hidrop_fx.models.family import Blocks, Family, Modality
from hidrop_fx.models.fuyu import fuyu
from hidrop_fx.models.gemma3 import gemma3
from hidrop_fx.models.gemma4 import gemma4, gemma4_unified
from hidrop_fx.models.granite4_vision import granite4_vision
from hidrop_fx.models.inferred import (
    check_steps,
    description,
    inferred_family,
    with_unread,
)
from hidrop_fx.models.llama4 import llama4
from hidrop_fx.models.llava import llava
from hidrop_fx.models.llava_onevision import llava_onevision
from hidrop_fx.models.molmo2 import molmo2
from hidrop_fx.models.ovis2 import ovis2
from hidrop_fx.models.paligemma import paligemma
from hidrop_fx.models.perception_lm import perception_lm
from hidrop_fx.models.video_llama_3 import video_llama_3
from hidrop_fx.models.zeroed_words import zeroed_words

logger = logging.getLogger("hidrop_fx")

FAMILIES: dict[str, Family] = {}
"""Families of classes that are not transformers' own, or are to be treated in another way, by name."""

DECLARED: dict[str, Callable[[Any], Family]] = {"Llama4ForConditionalGeneration": llama4}
"""Families of classes that follow another course than the one that is inferred, from the model."""

DEPARTURES: dict[str, Callable[[Family], Family]] = {
    "FuyuForCausalLM": fuyu,
    "Gemma3ForConditionalGeneration": gemma3,
    "Gemma4ForConditionalGeneration": gemma4,
    "Gemma4UnifiedForConditionalGeneration": gemma4_unified,
    "Granite4VisionForConditionalGeneration": granite4_vision,
    "Kimi_K25ForConditionalGeneration": zeroed_words,
    "LlavaForConditionalGeneration": llava,
    "LlavaOnevisionForConditionalGeneration": llava_onevision,
    "Molmo2ForConditionalGeneration": molmo2,
    "MuseGlimmerForConditionalGeneration": zeroed_words,
    "MuseSparkForConditionalGeneration": zeroed_words,
    "Ovis2ForConditionalGeneration": ovis2,
    "PaliGemmaForConditionalGeneration": paligemma,
    "PerceptionLMForConditionalGeneration": perception_lm,
    "VideoLlama3ForConditionalGeneration": video_llama_3,
}
"""What a class adds to, or changes in, the family that is inferred for it."""

_KNOWN = frozenset(
    f"{name}ForConditionalGeneration"
    for name in (
        "Llava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision", "VipLlava", "VideoLlava",
        "QianfanOCR", "Exaone4_5_", "InternVL", "GotOcr2", "Mistral3", "LightOnOcr", "AyaVision", "Cohere2Vision",
        "DeepseekVL", "DeepseekVLHybrid", "Janus", "Idefics2", "Idefics3", "SmolVLM", "Ovis2", "Aria",
        "Gemma3", "Gemma4", "Gemma4Unified", "PaliGemma", "Molmo2", "VideoLlama3", "Qwen2VL", "Qwen2_5_VL", "Glm4v", "Glm46V", "GlmOcr", "PaddleOCRVL",
        "Qwen3VL", "Qwen3VLMoe", "Granite4Vision",
        "HyperCLOVAXVisionV2", "MuseGlimmer", "MuseSpark", "Kimi_K25", "Cosmos3Edge", "Cosmos3Omni", "CohereCompass",
        "HunYuanVL", "Glm4vMoe", "FastVlm", "PerceptionLM", "GraniteDocling",
        "Qwen2_5OmniThinker", "Qwen3OmniMoeThinker", "DeepseekOcr2", "Lfm2Vl", "Lfm3Vl", "Llama4",
        "Qwen3_5", "Qwen3_5Moe", "MiniCPMV4_6",
    )
) | {"FuyuForCausalLM"}  # fmt: skip
_inferred: "weakref.WeakKeyDictionary[Any, Family]" = weakref.WeakKeyDictionary()

__all__ = [
    "BACKBONES",
    "DECLARED",
    "DEPARTURES",
    "FAMILIES",
    "Backbone",
    "Blocks",
    "Family",
    "Modality",
    "backbone_of",
    "family_of",
]


def family_of(model: Any) -> Family:
    """Return the family of a model: registered under its class's name, or inferred from the class.

    Raises:
        UnsupportedModelError: it has none; the message says why.
    """
    name = type(model).__name__
    for cls in type(model).__mro__ if FAMILIES else ():
        if cls.__name__ in FAMILIES:
            _check_own_forward(model, cls)
            return FAMILIES[cls.__name__]
    found = _inferred.get(model) if isinstance(model, nn.Module) else None
    if found is not None:
        return found
    _check_vision_language(model, name)
    shipped = _shipped(type(model))
    _check_own_forward(model, shipped)
    if shipped.__name__ in DECLARED:
        family = DECLARED[shipped.__name__](model)
    else:
        family = with_deepstack(model, inferred_family(model))
    if shipped.__name__ in DEPARTURES:
        family = DEPARTURES[shipped.__name__](family)
    if family.configured is not None:
        family = family.configured(family, model.config)
    check_steps(model, family)
    family = with_unread(model, family)
    if shipped.__name__ not in _KNOWN:
        logger.info(
            "%s is no class that was tried: inferred %s. hidrop_fx.compare under Schedule() tells "
            "whether it holds",
            name,
            description(family, model.config),
        )
    _inferred[model] = family
    return family


def backbone_of(model: Any) -> Backbone:
    """Return the backbone of a model's text decoder, inferred where `BACKBONES` has no record of it.

    Raises:
        UnsupportedModelError: a layer attends by a rule that is not known, or the decoder's code does
            not tell which masks it takes.
    """
    return infer_backbone(text_decoder(model))


def _shipped(cls: type) -> type:
    """Return the class of transformers that a class is or extends, or else the class itself."""
    return next((c for c in cls.__mro__ if c.__module__.startswith("transformers.models.")), cls)


def _check_own_forward(model: Any, cls: type) -> None:
    if type(model).forward is not getattr(cls, "forward", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} overrides forward of {cls.__name__}; a compiled model would never run "
            "it. Compile the class as transformers ships it"
        )


def _check_vision_language(model: Any, name: str) -> None:
    if hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"{name} wraps the model: compile what is inside, hidrop.compile(model.get_base_model(), "
            "...), and go on using the wrapper"
        )
    if not hasattr(model, "get_decoder") or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{name} is not a transformers generation model; hidrop_fx compiles vision-language models, "
            "as `from_pretrained` returns them"
        )
    config = getattr(model, "config", None)
    if not hasattr(config, "vision_config") and not hasattr(config, "image_token_id"):
        raise UnsupportedModelError(
            f"{name} is not a vision-language model: its config has no `vision_config`, so there "
            "are no vision tokens to schedule"
        )
