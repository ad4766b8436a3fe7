"""Steps that choosing and refining share: the objective, losses of trials, time spent, decisions noted."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from hidrop_fx.analysis.calibration.record import (
    CalibrationRecord,
    Candidate,
    Decision,
    Score,
)
from hidrop_fx.analysis.choosing.budgets import Budget
from hidrop_fx.analysis.measuring.hooked_decoder import eval_mode
from hidrop_fx.analysis.progress_bar import Tick, progress_bar
from hidrop_fx.analysis.searching.trials import Outcome, Trials
from hidrop_fx.analysis.searching.workbench import Workbench
from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.schedule.schedule import Schedule

OBJECTIVES: tuple[str, ...] = ("kl", "accuracy")


def check_objective(record: CalibrationRecord, objective: str) -> None:
    """Raise `ScheduleError` unless the samples can be judged by this objective."""
    if objective not in OBJECTIVES:
        raise ScheduleError(f"objective={objective!r}: use one of {', '.join(OBJECTIVES)}")
    if objective == "accuracy" and not record.labelled:
        raise ScheduleError(
            "objective='accuracy' needs labels in the calibration batches, which had none: use 'kl'"
        )


def bench_of(record: CalibrationRecord, step: str) -> Workbench:
    """Return model and samples, or raise `HidropError` naming the step that needs them."""
    if record.bench is None:
        raise HidropError(
            f"{step} needs the model and the samples, which a loaded calibration has not: call "
            "calibration.attach(model, batches) first"
        )
    return record.bench


@contextmanager
def accounted(record: CalibrationRecord) -> Iterator[None]:
    """Add the time and passes of the context to the record, with the model in eval mode meanwhile."""
    bench, started = record.bench, time.perf_counter()
    before = 0 if bench is None else bench.passes
    try:
        with nullcontext() if bench is None else eval_mode(bench.model):
            yield
    finally:
        record.seconds += time.perf_counter() - started
        record.passes += 0 if bench is None else bench.passes - before


def trials_bar(
    record: CalibrationRecord, what: str, runs: int, trials: Trials
) -> AbstractContextManager[Tick]:
    """Return a progress bar over so many runs of the trials' samples."""
    return progress_bar(what, runs * trials.size, shown=record.progress)


def trial_loss(
    trials: Trials, schedule: Schedule, objective: str, tick: Tick | None
) -> tuple[float, ...]:
    """Run a schedule and return the numbers to minimise, compared in order."""
    outcome = trials.run(schedule, tick)
    if objective == "accuracy":
        assert outcome.accuracy is not None
        return -outcome.accuracy, outcome.mean_kl
    return (outcome.mean_kl,)


def latency_reasons(
    record: CalibrationRecord, schedule: Schedule, budget: Budget
) -> tuple[str, ...]:
    """Tell the measured latency of a schedule and the spread of its runs, under a latency budget."""
    if record.bench is None or budget.name != "latency":
        return ()
    runs = record.bench.timings.get(schedule, ())
    if not runs:
        return ()
    return (
        f"latency {min(runs) * 1e3:.3g} ms, the fastest of {len(runs)} runs; the slowest took "
        f"{max(runs) * 1e3:.3g} ms. Differences below that are noise",
    )


def note_decision(
    record: CalibrationRecord,
    schedule: Schedule,
    origin: str,
    budget: Budget,
    reasons: tuple[str, ...],
    candidates: tuple[Candidate, ...] = (),
) -> None:
    """Append a decision with its scores."""
    record.decisions.append(
        Decision(
            schedule=schedule,
            origin=origin,
            budget=str(budget),
            reasons=reasons,
            candidates=candidates,
            **scores_of(record, schedule),
        )
    )


def scores_of(record: CalibrationRecord, schedule: Schedule) -> dict[str, Score | None]:
    """Return a schedule's scores by part; the held-out samples are run if the others were."""
    parts = {} if record.bench is None else record.bench.parts
    known = {name: trials.done.get(schedule) for name, trials in parts.items()}
    if known.get("search") is not None and "held_out" in parts:
        known["held_out"] = parts["held_out"].run(schedule)
    return {name: _score(known.get(name)) for name in ("search", "held_out")}


def _score(outcome: Outcome | None) -> Score | None:
    if outcome is None:
        return None
    return Score(kl=outcome.mean_kl, accuracy=outcome.accuracy, samples=len(outcome.kl))
