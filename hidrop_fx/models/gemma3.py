"""Gemma 3: the tokens of an image see each other both ways, in sliding layers within the window."""

from dataclasses import replace

from torch import Tensor

from hidrop_fx.models.family import Blocks, Family
from hidrop_fx.models.forward_code import MASKS, WORDS
from hidrop_fx.ops.masks import run_blocks


def gemma3(family: Family) -> Family:
    return replace(
        family,
        blocks=Blocks(argument="token_type_ids", of=_images, rule="within"),
        inputs=family.inputs | {"token_type_ids"},
        declares=family.declares | {MASKS, WORDS},
    )


def _images(types: Tensor) -> Tensor:
    return run_blocks(types == 1)
