"""Any schedule, scaled to a budget: what it keeps goes up and down by one factor.

    family = Scaled(Schedule.preset("fastv"))
    level  = largest_level(lambda n: budget.cost(family.at(n)), budget.limit, family.highest)

Layers stay where they are. Counts of filter layers, and of a reducer before the decoder, are multiplied by a factor
that is the same for all; of a schedule that has an exit alone, the exit moves.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import floor

from hidrop_fx.analysis.choosing.budgets import Budget, largest_level
from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods.call_text import call_text
from hidrop_fx.schedule.keeps import keep_count
from hidrop_fx.schedule.schedule import Schedule

_STEPS = 1000
"""Levels of a factor."""


@dataclass(frozen=True)
class Scaled:
    """A family of schedules that differ in how much they keep."""

    schedule: Schedule
    num_layers: int
    vision_tokens: int
    """Of one image."""
    reducer: bool = True
    """What a reducer leaves is scaled too."""

    @property
    def highest(self) -> int:
        """Level at which it keeps most; 0 if nothing of it can be scaled."""
        if self._counts:
            return _STEPS
        return 0 if self.schedule.exit is None else self.num_layers

    def at(self, level: int) -> Schedule:
        """Return the schedule at a level of 1 to `highest`; a filter that would drop nothing is left out."""
        schedule = self.schedule
        if schedule.average is not None:
            return replace(schedule, average=self._average(level))
        if not self._counts:
            return replace(schedule, exit=max(level, schedule.inject + 1))
        # At the highest level the least of all keeps has reached all tokens.
        factor = Fraction(level, _STEPS) / min(self._counts)
        prune = {layer: self._scaled(keep, factor) for layer, keep in schedule.prune.items()}
        before = self._before(factor) if self.reducer else schedule.before
        left = replace(schedule, before=before).entering_tokens(self.vision_tokens)
        dropping = {}
        for layer, keep in prune.items():
            tokens = keep_count(keep, left, rounding=schedule.rounding)
            if tokens < left:
                dropping[layer], left = keep, tokens
        behind, merge = schedule.retroactive, schedule.merge if dropping else None
        gone = behind is not None and behind.layer not in dropping
        cache = None if gone else schedule.cache
        return replace(schedule, prune=dropping, before=before, cache=cache, merge=merge)

    def _average(self, level: int) -> float:
        """Return the average between those that leave the filter layer nothing and all."""
        schedule = self.schedule
        assert schedule.exit is not None
        tokens = schedule.entering_tokens(self.vision_tokens)
        (layer,) = schedule.prune
        before, behind = layer - schedule.inject, schedule.exit - layer
        share = (before + Fraction(behind * level, _STEPS)) / self.num_layers
        return floor(share * tokens * 10**6) / 10**6

    def at_share(self, share: float) -> Schedule:
        """Return the schedule whose smallest count is that share of an image's tokens."""
        return self.at(max(1, round(share * _STEPS)))

    def _before(self, factor: Fraction) -> str | None:
        found = self.schedule.reduction
        if found is None:
            return None
        given = dict(found.arguments)
        given |= {name: self._scaled(given[name], factor) for name in found.reducer.counts}
        return call_text(found.reducer.name, given)

    def _scaled(self, keep: int | float, factor: Fraction) -> int | float:
        if isinstance(keep, float):
            return min(1.0, float(Fraction(repr(keep)) * factor))
        return min(self.vision_tokens, max(1, floor(keep * factor + Fraction(1, 2))))

    @cached_property
    def _counts(self) -> tuple[Fraction, ...]:
        """Return all counts that can be scaled, as shares of an image."""
        counts = list(self.schedule.prune.values())
        found = self.schedule.reduction
        if found is not None and self.reducer:
            given = dict(found.arguments)
            numbers = [given[name] for name in found.reducer.counts]
            # Several counts of one reducer add up to what it keeps.
            counts += [sum(numbers)] if numbers else []
        return tuple(
            Fraction(repr(keep)) if isinstance(keep, float) else Fraction(keep, self.vision_tokens)
            for keep in counts
            if keep
        )


def scaled_to(family: Scaled, budget: Budget) -> Schedule:
    """Return the largest schedule of a family within the budget.

    Raises:
        ScheduleError: even the smallest costs more, or it cannot be scaled and costs more as it is.
    """
    schedule = family.schedule
    schedule.validate(family.num_layers)
    if not family.highest:
        if budget.allows(schedule):
            return schedule
        raise ScheduleError(
            f"{schedule} costs {budget.cost(schedule):.4g} {budget.unit}".rstrip()
            + f", the budget is {budget}, and nothing of it can be scaled"
        )

    def cost(level: int) -> float:
        return budget.cost(family.at(level))

    level = largest_level(cost, budget.limit, family.highest)
    if not level or cost(level) > budget.limit:
        least = family.at(1)
        raise ScheduleError(
            f"{budget} is out of reach: the smallest of its kind, {least}, costs {budget.cost(least):.4g} "
            f"{budget.unit}".rstrip()
        )
    return family.at(level)
