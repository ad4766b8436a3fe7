"""Let text embeddings depend on image features in every process, so that gradients exist in the same places.

    text = depending(text, features)       # the same values; the gradient of the features is zero

FSDP2 gathers the parameters of a layer in backward if a gradient reaches the layer's output. Where the decoder is frozen,
that of a layer before the injection is reached only if a text position holds a feature, which is so in some batches and
not in others; and a process without images has no gradient of the vision tower at all. The others would wait.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def depending(text: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Return `text` [B, T, D], with a gradient of zero for those of `features` that require one."""
    wanted = [each for each in features if each.requires_grad]
    if not (wanted and torch.is_grad_enabled()):
        return text
    result: Tensor = _Depending.apply(text, *wanted)
    return result


class _Depending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, text: Tensor, *features: Tensor) -> Tensor:
        ctx.features = [(each.shape, each.dtype, each.device) for each in features]
        return text.view_as(text)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.features]
        return gradient, *zeros
