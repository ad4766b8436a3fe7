"""V2Drop: tokens that the layer before moved least are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hidrop_fx.methods.published import Fields, pairs, register_method
from hidrop_fx.methods.registry import register_scorer

if TYPE_CHECKING:
    from torch import Tensor


@register_scorer(
    "state_change", summary="norm of the change of a token's state over the layer before"
)
def state_change(hidden: Tensor, previous_hidden: Tensor) -> Tensor:
    """Compute the norm of the change of a token's state over the layer before, fp32 [B, S]."""
    change: Tensor = (hidden.float() - previous_hidden.float()).norm(dim=-1)
    return change


@register_method(
    "v2drop",
    source="V2Drop, CVPR 2026, arXiv 2509.01552; github.com/xuyang-liu16/V2Drop",
    summary="prunes by the norm of the change that the layer before made; the largest stay",
)
def v2drop(
    *, layers: Sequence[int] = (3, 17, 22), keeps: Sequence[int | float] = (0.5, 0.25, 1)
) -> Fields:
    """Keep so many tokens an image at each filter layer, or a share of the sample's tokens."""
    return {"prune": pairs(layers, keeps), "score": "state_change"}
