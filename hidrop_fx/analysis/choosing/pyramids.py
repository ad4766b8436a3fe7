"""Pyramids that a choice of layers allows, and the largest schedule of each inside a budget.

    for pyramid in pyramids_for(choice, budget, ...):
        level = largest_level(lambda n: budget.cost(pyramid.at(n)), budget.limit, pyramid.highest)

A pyramid is one number, its level, away from a schedule; its keeps never shrink as the level rises. Its
tail is the authors' (10, 5, 1), the same in proportion to the image's tokens, or keeps that fall by one
factor from filter to filter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import floor

from hidrop_fx.analysis.choosing.budgets import Budget, largest_level
from hidrop_fx.analysis.choosing.layer_choice import MOST_FILTERS, Choice
from hidrop_fx.errors import ScheduleError
from hidrop_fx.schedule.pyramid import TAIL, highest_level, pyramid
from hidrop_fx.schedule.schedule import Schedule

_FACTORS = (Fraction(1, 2), Fraction(1, 3))


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """A family of schedules that differ in how much they keep."""

    inject: int
    exit: int | None
    filters: tuple[int, ...]
    vision_tokens: int
    """Of one image."""
    tail: tuple[int, ...] = ()
    """Keeps after the head, where there is no factor."""
    factor: Fraction | None = None
    """What each filter layer leaves of the one before."""

    @property
    def highest(self) -> int:
        """Level at which it keeps most."""
        if self.factor is not None:
            return self.vision_tokens
        return highest_level(self.tail, self.vision_tokens)

    def at(self, level: int) -> Schedule:
        """Return the schedule at a level; a filter that would drop nothing is left out."""
        prune: dict[int, int | float] = {}
        before = self.vision_tokens
        for layer, keep in zip(self.filters, self._keeps(level), strict=True):
            if keep < before:
                prune[layer] = before = keep
        return Schedule(inject=self.inject, prune=prune, exit=self.exit)

    def __str__(self) -> str:
        places = "+".join(map(str, self.filters)) or "none"
        falls = f"falling by {self.factor}" if self.factor else f"tail {self.tail}"
        return f"filters {places}, {falls}" if len(self.filters) > 1 else f"filters {places}"

    def _keeps(self, level: int) -> tuple[int, ...]:
        if not self.filters:
            return ()
        if self.factor is None:
            return pyramid(level, self.tail, self.vision_tokens)
        powers = [self.factor**i for i in range(len(self.filters))]
        return tuple(max(1, floor(level * power + Fraction(1, 2))) for power in powers)


def pyramids_for(
    choice: Choice, budget: Budget, *, num_layers: int, vision_tokens: int
) -> tuple[list[Pyramid], tuple[str, ...]]:
    """Return pyramids that can keep to the budget, those that ILVAS speaks for first; and why these.

    Raises:
        ScheduleError: even one vision token from the first filter layer on costs too much.
    """
    exit_layer = None if choice.exit == num_layers else choice.exit

    def made(
        filters: Sequence[int], tail: Sequence[int], factor: Fraction | None = None
    ) -> Pyramid:
        return Pyramid(
            inject=choice.inject,
            exit=exit_layer,
            filters=tuple(filters),
            vision_tokens=vision_tokens,
            tail=tuple(tail),
            factor=factor,
        )

    untouched = made((), ())
    if budget.allows(untouched.at(1)):
        return [untouched], (
            "nothing needs to be pruned: inject and exit alone keep to the budget",
        )
    firsts = range(choice.inject, choice.exit)
    possible = [layer for layer in firsts if budget.allows(made((layer,), ()).at(1))]
    if not possible:
        least = made((choice.inject,), ()).at(1)
        raise ScheduleError(
            f"{budget} is out of reach: with inject={choice.inject} and exit={choice.exit} even one "
            f"vision token a layer ({least}) costs {budget.cost(least):.4g} {budget.unit}".rstrip()
            + "; allow more, or write a schedule with a later inject or an earlier exit"
        )
    first, reasons = _first_filters(choice, possible)
    pyramids = []
    for filters in _filter_sets(choice, first):
        pyramids += [made(filters, tail[: len(filters) - 1]) for tail in _tails(vision_tokens)]
        pyramids += [made(filters, (), factor) for factor in _FACTORS if len(filters) > 1]
    return pyramids, reasons


def solve(pyramid: Pyramid, budget: Budget) -> Schedule | None:
    """Return the largest schedule of a pyramid within the budget; None if there is none."""
    level = largest_level(lambda n: budget.cost(pyramid.at(n)), budget.limit, pyramid.highest)
    return pyramid.at(level) if level else None


def _tails(vision_tokens: int) -> list[tuple[int, ...]]:
    """Return the authors' tail as it is, and in proportion to the tokens of an image (theirs had 576)."""
    scaled = tuple(
        max(1, floor(Fraction(keep * vision_tokens, 576) + Fraction(1, 2))) for keep in TAIL
    )
    return list(dict.fromkeys([TAIL, scaled]))


def _first_filters(choice: Choice, possible: list[int]) -> tuple[list[int], tuple[str, ...]]:
    """Return layers for the first filter, best first; and why."""
    inner = [layer for layer in possible if layer > choice.inject]
    if not inner:
        return possible[:1], (
            f"first filter at the injection layer {choice.inject}: the budget leaves no layer that sees "
            "all vision tokens",
        )
    voted = [layer for layer in choice.filters if layer in inner]
    last = inner[-1]
    first = list(dict.fromkeys([*voted, last, *inner[-2:]]))
    if voted:
        return first, (
            f"first filter at layer {' or '.join(map(str, first))}: an ILVAS maximum that the budget can "
            "afford, or the last layers that it can",
        )
    return first, (
        f"first filter at layer {' or '.join(map(str, first))}: all vision tokens up to the ILVAS maxima "
        f"cost more than the budget; layer {last} is the last that it can afford",
    )


def _filter_sets(choice: Choice, firsts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield sets of up to `MOST_FILTERS` filter layers; later ones come from ILVAS and an even spread."""
    for first in firsts:
        later = [layer for layer in choice.filters if layer > first]
        gap = (choice.exit - first) / MOST_FILTERS
        even = [first + floor(gap * i + 0.5) for i in range(1, MOST_FILTERS)]
        fill = [layer for layer in even if first < layer < choice.exit and layer not in later]
        pool = list(dict.fromkeys([*later, *fill]))[: MOST_FILTERS - 1]
        for count in range(len(pool), -1, -1):
            for rest in combinations(pool, count):
                yield (first, *sorted(rest))
