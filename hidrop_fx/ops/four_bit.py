"""Products with 4-bit weights of bitsandbytes: one node, whose code is bitsandbytes' own.

y = linear_4bit(x, weight, bias, out_features)      # weight: Params4bit, packed bytes and their scales

While a decoder is captured the product is the opaque operator `hidrop::linear_4bit`, whose weight is the packed one. In the
graph `linear_4bit` stands in its place, which hands the weight and what it knows of its scales to bitsandbytes.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@torch.library.custom_op("hidrop::linear_4bit", mutates_args=())
def captured_linear_4bit(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, compute: torch.dtype | None
) -> Tensor:
    """Mark a product in a captured graph: [..., in] x packed weight -> [..., out]."""
    raise RuntimeError("hidrop::linear_4bit marks a product in a captured graph and has no kernel")


@captured_linear_4bit.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, compute: torch.dtype | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


CAPTURED_LINEAR_4BIT = torch.ops.hidrop.linear_4bit.default


def linear_4bit(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    out_features: int,
    compute: torch.dtype | None,
) -> Tensor:
    """Compute x [..., in] times a weight of bitsandbytes -> [..., out], in the dtype of x, as its `Linear4bit` does.

    Args:
        weight: a `Params4bit`, with its `quant_state`.
        compute: dtype of the product; None for that of x.
    """
    if isinstance(x, FakeTensor):  # shapes alone are asked for
        return x.new_empty(*x.shape[:-1], out_features)
    import bitsandbytes

    given = x if compute is None else x.to(compute)
    if bias is not None:
        bias = bias.to(given.dtype)
    found: Tensor = bitsandbytes.matmul_4bit(
        given, weight, bias=bias, quant_state=weight.quant_state
    )
    return found.to(x.dtype)
