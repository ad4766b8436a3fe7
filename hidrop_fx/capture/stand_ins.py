"""Plain tensors that a trace is shown in the place of weights that are sharded, divided, offloaded or elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def stand_in(
    tensor: Tensor,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return a plain tensor, or parameter, over one element of memory, like another unless said otherwise.

    Its values mean nothing: a trace reads none.
    """
    one = torch.empty((), dtype=dtype or tensor.dtype, device=device or tensor.device)
    plain = one.expand(tensor.shape if shape is None else tuple(shape))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(plain, requires_grad=tensor.requires_grad)
    return plain
