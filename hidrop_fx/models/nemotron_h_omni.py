"""Nemotron-H Omni: a class without a base model of its own, over a decoder of Mamba-2 layers; its images alone."""

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast

from hidrop_fx.models.family import Family
from hidrop_fx.models.inferred import modality_of


def nemotron_h_omni(model: Any) -> Family:
    image = modality_of(model, model, "image")
    assert image is not None
    return Family(
        modalities=(image,),
        base_output=MoeModelOutputWithPast,
        output=CausalLMOutputWithPast,
    )
