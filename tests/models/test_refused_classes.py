"""Classes of transformers that are not scheduled, each refused by what it does: default configurations, without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import hidrop_fx as hidrop
from hidrop_fx.models import backbone_of, family_of

NO_BASE = r"has no base model under \.model"
NO_FEATURES = "has no get_image_features whose result is put at placeholder tokens"
LAYERS = "has layers of type .*{}"
REFUSED = {
    "Blip2ForConditionalGeneration": NO_BASE,
    "Dots3NoteForConditionalGeneration": LAYERS.format("indexed_attention"),
    "Ernie4_5_VLMoeForConditionalGeneration": "hands moe_mm_token_type_ids to its text decoder",
    "Florence2ForConditionalGeneration": "is an encoder-decoder",
    "Glm5NextForConditionalGeneration": LAYERS.format("linear_attention"),
    "IdeficsForVisionText2Text": "has no text model of its own",
    "InklingForConditionalGeneration": r"makes its logits in a way .*: from outputs\[0\] / ",
    "InstructBlipForConditionalGeneration": NO_BASE,
    "InstructBlipVideoForConditionalGeneration": NO_BASE,
    "Kosmos2ForConditionalGeneration": NO_BASE,
    "Kosmos2_5ForConditionalGeneration": NO_BASE,
    "MistralLarge4ForConditionalGeneration": LAYERS.format("indexed_attention"),
    "MllamaForConditionalGeneration": NO_FEATURES,
    "PI0ForConditionalGeneration": "is not a transformers generation model",
    "Pix2StructForConditionalGeneration": "is an encoder-decoder",
    "T5Gemma2ForConditionalGeneration": "is an encoder-decoder",
    "UnlimitedOcrForConditionalGeneration": LAYERS.format("reference_sliding_attention"),
}


def read_off(model: Any) -> None:
    """As `hidrop.compile` does, before it looks at weights."""
    family_of(model)
    backbone_of(model)


@pytest.mark.families
@pytest.mark.parametrize("name", REFUSED)
def test_a_class_is_refused_by_what_it_does(name: str) -> None:
    cls = getattr(hf, name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    with torch.device("meta"):
        model = cls(cls.config_class())
    with pytest.raises(hidrop.UnsupportedModelError, match=REFUSED[name]):
        read_off(model)
