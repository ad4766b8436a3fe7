"""Molmo 2: all image tokens of a row are one block, frames of videos are causal; features are added to embeddings."""

from dataclasses import replace

import torch
from torch import Tensor

from hidrop_fx.models.family import Blocks, Family
from hidrop_fx.models.forward_code import EMBEDDINGS, MASKS


def molmo2(family: Family) -> Family:
    return replace(
        family,
        blocks=Blocks(argument="mm_token_type_ids", of=_all_images, rule="beyond", required=True),
        adds_features=True,
        inputs=family.inputs | {"mm_token_type_ids"},
        declares=family.declares | {EMBEDDINGS, MASKS},
    )


def _all_images(types: Tensor) -> Tensor:
    return torch.where(types == 1, 0, -1)
