"""A schedule's fields, each checked for itself.

check_values(schedule)      # every field is a plain value of its type from here on
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods import SCORERS
from hidrop_fx.methods.cache_cuts import cache_cut
from hidrop_fx.methods.reducers import reduction
from hidrop_fx.schedule.keeps import (
    checked_average,
    checked_int,
    checked_keeps,
    checked_layers,
    checked_weight,
)

if TYPE_CHECKING:
    from hidrop_fx.schedule.schedule import Schedule


def check_values(schedule: Schedule) -> None:
    """Put plain numbers, `Keeps` and the full names of rules into the fields of a schedule that is being made.

    Raises:
        ScheduleError: a field is of another type, out of its range, or names a rule that is not registered.
    """

    def put(name: str, value: object) -> None:
        object.__setattr__(schedule, name, value)

    put("inject", checked_int(schedule.inject, "inject", minimum=0))
    put("prune", checked_keeps(schedule.prune))
    if schedule.exit is not None:
        put("exit", checked_int(schedule.exit, "exit", minimum=1))
    if schedule.before is not None:
        if not isinstance(schedule.before, str):
            raise ScheduleError(
                f"before={schedule.before!r} is no str: name a reducer, such as 'divprune(ratio=0.098)'"
            )
        put("before", str(reduction(schedule.before)))
    if schedule.reads is not None:
        put("reads", checked_layers(schedule.reads, "reads"))
    if not isinstance(schedule.freeze_system, bool):
        raise ScheduleError(f"freeze_system={schedule.freeze_system!r}: use True or False")
    if schedule.bottleneck is not None:
        put("bottleneck", checked_int(schedule.bottleneck, "bottleneck", minimum=0))
    if schedule.cache is not None:
        if not isinstance(schedule.cache, str):
            raise ScheduleError(
                f"cache={schedule.cache!r} is no str: name a cache cut, such as 'snapkv(window=32,capacity=256)'"
            )
        put("cache", str(cache_cut(schedule.cache)))
    put("average", checked_average(schedule.average))
    put("budget_weight", checked_weight(schedule.budget_weight))
    if isinstance(schedule.score, str) and "(" in schedule.score:
        put("score", SCORERS[schedule.score].name)
