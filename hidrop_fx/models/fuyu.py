"""Fuyu: an image's features are its projected patches, the last hidden state of an encoder without layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hidrop_fx.models.family import Family


def fuyu(family: Family) -> Family:
    kinds = tuple(replace(kind, features=_patches) for kind in family.modalities)
    return replace(family, modalities=kinds)


def _patches(base: Any, output: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    return list(output.last_hidden_state)
