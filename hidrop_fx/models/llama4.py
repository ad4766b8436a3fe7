"""Llama 4: a class without a base model of its own, whose features are projected in its forward."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.llama4.modeling_llama4 import Llama4CausalLMOutputWithPast

from hidrop_fx.models.family import Family
from hidrop_fx.models.inferred import modality_of


def llama4(model: Any) -> Family:
    image = modality_of(model, model, "image")
    assert image is not None
    return Family(
        modalities=(replace(image, features=_projected),),
        base_output=MoeModelOutputWithPast,
        output=Llama4CausalLMOutputWithPast,
    )


def _projected(base: Any, output: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    states = output.last_hidden_state
    features = base.multi_modal_projector(states.flatten(0, 1))
    return list(features.unflatten(0, states.shape[:2]))
