"""Select the pyramid that does least harm inside a budget.

pyramids = those that the choice of layers allows and the budget can afford, likely ones first
solved   = the largest schedule of each inside the budget
best     = the one with the least objective on the samples not held out
"""

from collections.abc import Mapping

from hidrop_fx.analysis.calibration.decisions import (
    accounted,
    bench_of,
    check_objective,
    latency_reasons,
    note_decision,
    trial_loss,
    trials_bar,
)
from hidrop_fx.analysis.calibration.record import CalibrationRecord
from hidrop_fx.analysis.choosing.budgets import Budget, budget_of
from hidrop_fx.analysis.choosing.pyramids import pyramids_for, solve
from hidrop_fx.errors import ScheduleError
from hidrop_fx.schedule.keeps import checked_int
from hidrop_fx.schedule.schedule import Schedule


def select_schedule(
    record: CalibrationRecord,
    limits: Mapping[str, float | None],
    *,
    trials: int,
    objective: str,
) -> Schedule:
    """Select a schedule inside the one budget given, and note the decision in the record.

    Raises:
        ScheduleError: not exactly one budget, or no pyramid can keep to it.
    """
    check_objective(record, objective)
    trials = checked_int(trials, "trials", minimum=0)
    budget = budget_of(
        record.typical, **limits, seconds=None if record.bench is None else record.bench.latency
    )
    with accounted(record):
        wanted = max(1, trials) if record.bench is not None else 1
        found, why = _candidates(record, budget, wanted)
        best = next(iter(found))
        if len(found) > 1:
            bench = bench_of(record, "comparing pyramids")
            with trials_bar(record, "pyramids", len(found), bench.search) as tick:
                losses = {s: trial_loss(bench.search, s, objective, tick) for s in found}
            best = min(losses, key=losses.__getitem__)
        compared = (
            f"of {len(found)} pyramids that fit {budget} the one with the least {objective} on the "
            "samples not held out"
            if len(found) > 1
            else f"the first pyramid that fits {budget}; none was tried"
        )
        reasons = (*record.choice.reasons, *why, f"{found[best]}: {compared}")
        reasons += latency_reasons(record, best, budget)
        note_decision(record, best, "schedule", budget, reasons)
    return best


def _candidates(
    record: CalibrationRecord, budget: Budget, wanted: int
) -> tuple[dict[Schedule, str], tuple[str, ...]]:
    """Return up to `wanted` schedules with the text of their pyramid; and why these pyramids."""
    pyramids, why = pyramids_for(
        record.choice,
        budget,
        num_layers=record.num_layers,
        vision_tokens=record.typical.tokens_per_image,
    )
    found: dict[Schedule, str] = {}
    for pyramid in pyramids:
        solved = solve(pyramid, budget)
        if solved is not None:
            found.setdefault(solved, str(pyramid))
        if len(found) == wanted:
            break
    if not found:
        raise ScheduleError(f"no pyramid keeps to {budget}; allow a little more")
    return found, why
