"""Granite 4 Vision: an image is what is added to it, at the inputs of several layers; its places enter as zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.models.family import Family, TowerAdditions
from hidrop_fx.models.forward_code import EMBEDDINGS
from hidrop_fx.planning.deepstack import Deepstack


def granite4_vision(family: Family) -> Family:
    image = family.modality("image")
    assert image is not None
    return replace(
        family,
        modalities=(replace(image, features=_zeros),),
        deepstack=TowerAdditions(places=_places, features=_features, repeated=_repeated),
        declares=family.declares | {EMBEDDINGS, "vision_mask", "deepstack_features"},
    )


def _zeros(base: Any, output: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    return [torch.zeros_like(entry) for entry in _entries(output.deepstack_features[0][1])]


def _places(config: Any) -> Deepstack:
    mapped = {layer for _, layer in config.deepstack_layer_map}
    layers = tuple(sorted(mapped | set(config.spatial_target_layers)))
    return Deepstack(layers=layers, of_layer=True, whole=True)


def _features(config: Any, output: Any) -> Sequence[Sequence[Tensor]]:
    found = {layer: _entries(entries) for layer, entries in output.deepstack_features}
    return [found[layer] for layer in _places(config).layers]


def _repeated(config: Any, entries: list[Tensor]) -> Any:
    return [(layer, entries) for layer in _places(config).layers]


def _entries(features: Any) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)
