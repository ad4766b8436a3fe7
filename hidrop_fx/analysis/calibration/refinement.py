"""Refine a schedule by local search inside its budget.

improvements = schedules that lowered the objective on the samples not held out, step by step
best         = the improvement that is best over all samples
"""

from collections.abc import Callable

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
from hidrop_fx.analysis.choosing.budgets import budget_of
from hidrop_fx.analysis.searching.local_search import local_search
from hidrop_fx.analysis.searching.trials import with_counts
from hidrop_fx.analysis.searching.workbench import Workbench
from hidrop_fx.errors import ScheduleError
from hidrop_fx.schedule.keeps import checked_int
from hidrop_fx.schedule.schedule import Schedule


def refine_schedule(
    record: CalibrationRecord,
    schedule: Schedule | str,
    evaluations: int,
    *,
    objective: str,
    seed: int | None,
    limits: dict[str, float],
    on_improvement: Callable[[], None],
) -> Schedule:
    """Search around a schedule, and note the decision in the record.

    Args:
        limits: one budget by name; none for the average vision tokens of the start.
        on_improvement: called after every improvement, to save what is known.

    Raises:
        ScheduleError: the start does not fit the model or costs more than the budget.
        HidropError: no model is attached.
    """
    check_objective(record, objective)
    evaluations = checked_int(evaluations, "evaluations", minimum=0)
    start = _start(record, schedule)
    bench = bench_of(record, "refine")
    costs = record.typical.plan(start, images=1)
    limits = limits or {"average_vision_tokens": costs.average_vision_tokens}
    budget = budget_of(record.typical, seconds=bench.latency, **limits)
    if not budget.allows(start):
        raise ScheduleError(
            f"the schedule to refine, {start}, costs {budget.cost(start):.4g} {budget.unit}".rstrip()
            + f", but the budget is {budget}: start from one inside it, such as "
            "calibration.schedule(...) gives"
        )
    seed = record.seed if seed is None else seed
    improvements = [start]

    def note(candidate: Schedule, better: bool) -> None:
        if better:
            improvements.append(candidate)
            on_improvement()

    with accounted(record), trials_bar(record, "refine", evaluations + 1, bench.search) as tick:
        local_search(
            start,
            counts=costs.vision_tokens,
            vision_tokens=record.typical.tokens_per_image,
            allowed=budget.allows,
            loss=lambda s: trial_loss(bench.search, s, objective, tick),
            evaluations=evaluations,
            seed=seed,
            tick=note,
        )
        best = _best_over_all(bench, improvements, objective)
        reasons = (
            f"started from {start}",
            f"{evaluations} evaluations of {objective} with seed {seed}, "
            f"{len(improvements) - 1} improvements",
            f"improvement {improvements.index(best)} is the best over all samples, held out or not",
            *latency_reasons(record, best, budget),
        )
        note_decision(record, best, "refine", budget, reasons)
    return best


def _start(record: CalibrationRecord, schedule: Schedule | str) -> Schedule:
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, record.num_layers)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule is a {type(schedule).__name__}; pass a hidrop_fx.Schedule, such as "
            'calibration.schedule(...) gives, or a string such as "inject=8,prune=10:215"'
        )
    schedule.validate(record.num_layers)
    return with_counts(schedule)


def _best_over_all(bench: Workbench, improvements: list[Schedule], objective: str) -> Schedule:
    """Return the improvement that does best over all samples; the start is one of them.

    The held-out part alone is too small to judge by: one sample in it can outweigh the rest.
    """

    def loss(schedule: Schedule) -> tuple[float, ...]:
        outcomes = [trials.run(schedule) for trials in bench.parts.values()]
        kl = [value for outcome in outcomes for value in outcome.kl]
        right = [value for outcome in outcomes for value in outcome.right or ()]
        accuracy = (-sum(right) / len(right),) if objective == "accuracy" else ()
        return (*accuracy, sum(kl) / len(kl))

    return min(reversed(improvements), key=loss)
