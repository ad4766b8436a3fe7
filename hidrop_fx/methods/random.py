"""No score at all: tokens are drawn anew in every call, the baseline of every table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hidrop_fx.methods.needs import Widths, scoring_cost
from hidrop_fx.methods.published import Fields, pairs, register_method
from hidrop_fx.methods.registry import register_scorer

if TYPE_CHECKING:
    from torch import Tensor


def as_attention(tokens: int, dropped: int, model: Widths) -> int:
    """Count what a score by attention costs, so that a baseline has the budget of what it is held against."""
    return scoring_cost({"query", "key"}, tokens, dropped, model)


@register_scorer(
    "random",
    differentiable=False,
    deterministic=False,
    summary="nothing: tokens are drawn anew in every call",
    cost=as_attention,
)
def random_scores(columns: Tensor) -> Tensor:
    """Draw scores anew in every call, fp32 [B, S]."""
    return columns.float().uniform_()


@register_method(
    "random",
    source="a baseline",
    summary="prunes that draw the tokens to keep",
)
def random(
    *,
    layers: Sequence[int] = (2,),
    keeps: Sequence[int | float] = (0.5,),
    inject: int = 0,
    exit: int | None = None,
) -> Fields:
    """Keep as many tokens as another schedule, drawn anew in every call."""
    return {"inject": inject, "prune": pairs(layers, keeps), "exit": exit, "score": "random"}
