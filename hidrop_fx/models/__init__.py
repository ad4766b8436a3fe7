"""Model families and text backbones: one record each holds what differs between them.

A *family* says how a VLM class takes its images and what it returns; a *backbone* says which masks
its text decoder wants. To add a family, write a `Family` and put it into `FAMILIES`; where the new
model embeds text, scatters image features and calls a decoder, as LLaVA does, no other code changes.
"""

from typing import Any

from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.models.backbone import BACKBONES, Backbone
from hidrop_fx.models.family import Family
from hidrop_fx.models.llava import LLAVA

FAMILIES: dict[str, Family] = {"LlavaForConditionalGeneration": LLAVA}

__all__ = ["BACKBONES", "FAMILIES", "Backbone", "Family", "backbone_of", "family_of"]


def family_of(model: Any) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedModelError: it has none; the message names what is missing.
    """
    name = type(model).__name__
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            if type(model).forward is not getattr(cls, "forward", None):
                raise UnsupportedModelError(
                    f"{name} overrides forward of {cls.__name__}; a compiled model would never run it. "
                    "Compile the class as transformers ships it"
                )
            return FAMILIES[cls.__name__]
    if hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"{name} wraps the model: compile what is inside, hidrop.compile(model.get_base_model(), "
            "...), and go on using the wrapper"
        )
    supported = ", ".join(FAMILIES)
    if not hasattr(model, "get_decoder") or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{name} is not a transformers generation model; hidrop_fx compiles {supported}, as "
            "`from_pretrained` returns them"
        )
    if not hasattr(getattr(model, "config", None), "vision_config"):
        raise UnsupportedModelError(
            f"{name} is not a vision-language model: its config has no `vision_config`, so there "
            f"are no vision tokens to schedule; hidrop_fx compiles {supported}"
        )
    raise UnsupportedModelError(
        f"{name} has no row in hidrop_fx.models.FAMILIES, which knows {supported}; the row must say "
        "how the model encodes images and which token marks their places"
    )


def backbone_of(model: Any) -> Backbone:
    """Return the backbone of a model's text decoder.

    Raises:
        UnsupportedModelError: the decoder's masks are not known.
    """
    kind = model.config.get_text_config().model_type
    if kind not in BACKBONES:
        raise UnsupportedModelError(
            f"the text decoder of this {type(model).__name__} is of type {kind!r}; its attention "
            f"pattern has no row in hidrop_fx.models.BACKBONES, which knows {', '.join(BACKBONES)}"
        )
    return BACKBONES[kind]
