"""PaliGemma: image and question are one block that sees itself both ways, the answer is causal; positions from 1."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.models.family import Blocks, Family
from hidrop_fx.models.forward_code import MASKS, POSITION_IDS, WORDS


def paligemma(family: Family) -> Family:
    return replace(
        family,
        blocks=Blocks(argument="token_type_ids", of=_prefix, rule="beyond", vision=0),
        position_ids=_counted_from_one,
        inputs=family.inputs | {"token_type_ids"},
        declares=family.declares | {MASKS, POSITION_IDS, WORDS},
    )


def _prefix(types: Tensor) -> Tensor:
    return torch.where(types == 0, 0, -1)


def _counted_from_one(base: Any, inputs: dict[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    shape = (inputs["inputs_embeds"] if ids is None else ids).shape[:2]
    return torch.arange(1, shape[1] + 1, device="cpu").expand(shape)
