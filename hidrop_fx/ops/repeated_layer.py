"""Nodes of layers that are not traced one by one: what a traced layer was given and returned, and another like it.

    %hidden_1, %cos_1, %sin_1 = hidrop.layer_given([%hidden, %cos, %sin], 0)     # in front of the nodes of layers.0
    [%out] = hidrop.layer_returned([%add_5], 0)                                  # behind them
    [%out_1] = hidrop.layer_like([%out, %cos, %sin], [0], 1, 0)                  # in the place of those of layers.1

Capture puts a copy of the nodes of the first in the place of the second; none of them has a kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_NO_KERNEL = "this operator marks a layer while a decoder is traced, has no kernel, and is part of no captured graph"


@torch.library.custom_op("hidrop::layer_given", mutates_args=())
def layer_given(inputs: Sequence[Tensor], layer: int) -> list[Tensor]:
    """Mark what a layer is called with: tensors of its own, so that what it does to them shows in no other's."""
    raise RuntimeError(_NO_KERNEL)


@layer_given.register_fake
def _(inputs: Sequence[Tensor], layer: int) -> list[Tensor]:
    return [torch.empty_like(value) for value in inputs]


@torch.library.custom_op("hidrop::layer_returned", mutates_args=())
def layer_returned(outputs: Sequence[Tensor], layer: int) -> list[Tensor]:
    """Mark what a layer returned."""
    raise RuntimeError(_NO_KERNEL)


@layer_returned.register_fake
def _(outputs: Sequence[Tensor], layer: int) -> list[Tensor]:
    return [torch.empty_like(value) for value in outputs]


@torch.library.custom_op("hidrop::layer_like", mutates_args=())
def layer_like(
    inputs: Sequence[Tensor], outputs: Sequence[int], layer: int, traced: int
) -> list[Tensor]:
    """Stand for a layer that computes as another does, with parameters of its own.

    Args:
        outputs: places of the inputs whose shape and dtype its outputs have.
        layer: its place in the decoder.
        traced: that of the other.
    """
    raise RuntimeError(_NO_KERNEL)


@layer_like.register_fake
def _(inputs: Sequence[Tensor], outputs: Sequence[int], layer: int, traced: int) -> list[Tensor]:
    return [torch.empty_like(inputs[place]) for place in outputs]


LAYER_GIVEN = torch.ops.hidrop.layer_given.default
LAYER_RETURNED = torch.ops.hidrop.layer_returned.default
LAYER_LIKE = torch.ops.hidrop.layer_like.default
