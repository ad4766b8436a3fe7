"""Selections: the number of tokens that a filter layer keeps, as many as the schedule says, or as training finds best."""

from dataclasses import dataclass

from hidrop_fx.methods.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A rule for the number of tokens that a filter layer keeps."""

    name: str
    learns: bool
    """Training learns the share of its tokens that each filter layer drops."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Rule by which a learned selection ranks tokens."""

    name: str
    differentiable: bool
    """Scores get gradients, not the learned shares alone."""


SELECTIONS: Registry[Selection] = Registry("selection", default="hard")
SELECTIONS.add("hard", Selection(name="hard", learns=False))
SELECTIONS.add("dtopk", Selection(name="dtopk", learns=True))

RANKS: Registry[Rank] = Registry("rank", default="hard")
RANKS.add("hard", Rank(name="hard", differentiable=False))
RANKS.add("soft", Rank(name="soft", differentiable=True))
