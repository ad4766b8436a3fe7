"""Hold methods against each other inside one budget, on the calibration samples.

    hidrop                          the pyramid that `select_schedule` chooses
    "fastv", "divprune(ratio=.2)"   scaled to the budget: `scaled_to`
    "divprune+hidrop"               a reducer to a half or a quarter, and the pyramid, scaled, behind it

The least objective on the samples not held out wins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

from hidrop_fx.analysis.calibration.decisions import (
    accounted,
    bench_of,
    check_objective,
    note_decision,
    scores_of,
    trial_loss,
    trials_bar,
)
from hidrop_fx.analysis.calibration.record import CalibrationRecord, Candidate
from hidrop_fx.analysis.choosing.budgets import Budget, budget_of
from hidrop_fx.analysis.choosing.scaled import Scaled, scaled_to
from hidrop_fx.errors import ScheduleError
from hidrop_fx.schedule.schedule import Schedule

OWN = "hidrop"
_LEFT = (1 / 2, 1 / 4)
"""Shares of an image's tokens that a reducer leaves in front of a pyramid."""


def compare_methods(
    record: CalibrationRecord,
    methods: Sequence[Schedule | str],
    select: Callable[[], Schedule],
    limits: Mapping[str, float | None],
    *,
    objective: str,
) -> Schedule:
    """Run every candidate on the samples, note the decision in the record, and return the best.

    Args:
        select: chooses the pyramid that stands for "hidrop".

    Raises:
        ScheduleError: no candidate keeps to the budget, or they are no list.
        HidropError: no model is attached.
    """
    check_objective(record, objective)
    bench = bench_of(record, "comparing methods")
    if isinstance(methods, str | Schedule) or not methods:
        raise ScheduleError(
            f'methods={methods!r}: name several in a list, such as ["hidrop", "fastv", "divprune+hidrop"]'
        )
    budget = budget_of(record.typical, **limits, seconds=bench.latency)
    found, left_out = _candidates(record, methods, cache(select), budget)
    if not found:
        raise ScheduleError(f"no method keeps to {budget}: {'; '.join(left_out)}")
    with accounted(record):
        with trials_bar(record, "methods", len(found), bench.search) as tick:
            losses = {
                name: trial_loss(bench.search, schedule, objective, tick)
                for name, schedule in found.items()
            }
        ranked = sorted(found, key=losses.__getitem__)
        tried = tuple(
            Candidate(
                name=name,
                schedule=found[name],
                cost=budget.cost(found[name]),
                **scores_of(record, found[name]),
            )
            for name in ranked
        )
        note_decision(
            record,
            found[ranked[0]],
            "methods",
            budget,
            (*_reasons(tried, budget, objective), *left_out),
            tried,
        )
    return found[ranked[0]]


def _candidates(
    record: CalibrationRecord,
    methods: Sequence[Schedule | str],
    own: Callable[[], Schedule],
    budget: Budget,
) -> tuple[dict[str, Schedule], tuple[str, ...]]:
    """Return schedules inside the budget by their names; and why the others are none."""
    found: dict[str, Schedule] = {}
    left_out = []
    for method in methods:
        try:
            if method == OWN:
                found[OWN] = own()
                continue
            for name, family in _families(record, method, own).items():
                found[name] = scaled_to(family, budget)
        except ScheduleError as error:
            left_out.append(f"{method} was not tried: {error}")
    return found, tuple(left_out)


def _families(
    record: CalibrationRecord, method: Schedule | str, own: Callable[[], Schedule]
) -> dict[str, Scaled]:
    """Return what a candidate stands for, by name.

    Raises:
        ScheduleError: it is no schedule, or one that cannot be run here.
    """
    name, sizes = str(method), (record.num_layers, record.typical.tokens_per_image)
    reducer, joined, _ = name.partition(f"+{OWN}")
    schedule = method if isinstance(method, Schedule) else Schedule.parse(reducer)
    reduction = schedule.reduction
    if reduction is not None and reduction.reducer.reads_pixels:
        raise ScheduleError(
            "it reads the vision tower, or pixels, and calibration encodes images once"
        )
    if not joined:
        return {name: Scaled(schedule, *sizes)}
    if reduction is None or schedule.prune or schedule.exit is not None:
        raise ScheduleError(f"{reducer} is no stage before the decoder, and nothing else")
    found = {}
    for share in _LEFT:
        joint = replace(own(), before=Scaled(schedule, *sizes).at_share(share).before)
        found[f"{reducer} to {share:.0%}+{OWN}"] = Scaled(joint, *sizes, reducer=False)
    return found


def _reasons(tried: Sequence[Candidate], budget: Budget, objective: str) -> tuple[str, ...]:
    best = tried[0]
    assert best.search is not None
    samples = best.search.samples
    if len(tried) == 1:
        return (f"{best.name}: the only method that fits {budget}",)
    second = tried[1]
    assert second.search is not None
    ahead = f"KL {best.search.kl:.4f} against {second.search.kl:.4f} of {second.name}"
    if objective == "accuracy" and best.search.accuracy is not None:
        assert second.search.accuracy is not None
        ahead = f"accuracy {best.search.accuracy:.1%} against {second.search.accuracy:.1%} of {second.name}, {ahead}"
    return (
        f"{best.name}: of {len(tried)} methods that fit {budget} the best {objective} on {samples} samples, {ahead}",
    )
