"""What a calibration found out, and the schedules it leads to.

    calibration = hidrop.calibrate(model, batches)
    schedule = calibration.schedule(average_vision_tokens=64)
    schedule = calibration.refine(schedule, evaluations=50)
    print(calibration.table()); calibration.plot("calibration.png"); calibration.save("calibration.json")

A calibration read from a file knows its measurements and decisions; `attach` gives it the model and the
samples again, which `refine`, latency budgets and the comparison of shapes need.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hidrop_fx.analysis.choosing.budgets import Budget, TypicalSample, budget_of
from hidrop_fx.analysis.choosing.layer_choice import Choice, choose
from hidrop_fx.analysis.choosing.pyramids import shapes_for, solve
from hidrop_fx.analysis.data.samples import prepare
from hidrop_fx.analysis.measuring.layers import Measurements, full_model, sketch
from hidrop_fx.analysis.measuring.sweeps import Sweep
from hidrop_fx.analysis.measuring.watched_decoder import eval_mode
from hidrop_fx.analysis.progress_bar import Tick, progress_bar
from hidrop_fx.analysis.searching.local_search import local_search
from hidrop_fx.analysis.searching.trials import Outcome, Trials, check_backend, with_counts
from hidrop_fx.analysis.searching.workbench import Workbench
from hidrop_fx.errors import HidropError, InputError, ScheduleError
from hidrop_fx.inspection.table import as_html, as_text
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.schedule.schedule import Schedule, checked_int

# Beyond what another device or kernel changes, and below what another training does.
_SAME_MODEL = 0.01

OBJECTIVES: tuple[str, ...] = ("kl", "accuracy")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A schedule on one part of the samples, means over them."""

    kl: float
    """Nats, of the next token, from the full model."""
    accuracy: float | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A schedule that was chosen or refined, and how that came about."""

    schedule: Schedule
    origin: str
    """"schedule" or "refine"."""
    budget: str
    reasons: tuple[str, ...]
    search: Score | None
    """On the samples it was chosen on; None if it was not tried."""
    held_out: Score | None
    """On the others; None if there are none."""


@dataclass(kw_only=True)
class Calibration:
    """Measurements of one model on some samples. Made by `hidrop_fx.calibrate` or `load`."""

    model: str
    """Name of the model's class, or its path."""
    typical: TypicalSample
    samples: int
    digest: str
    """Fingerprint of the samples."""
    measurements: Measurements
    exits: Sweep
    injections: Sweep
    tolerance: float
    seed: int
    passes: int
    """Calls of the decoder so far, one batch each."""
    seconds: float
    """Wall time so far."""
    sketch: tuple[float, ...]
    """Of the untouched model's log-probabilities: tells one set of weights from another."""
    decisions: list[Decision] = field(default_factory=list)
    bench: Workbench | None = field(default=None, repr=False, compare=False)
    progress: bool = field(default=False, repr=False, compare=False)
    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict, repr=False)
    """Of every schedule tried in `schedule` and `refine`: part -> text form -> outcome."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.typical.geometry.num_layers

    @property
    def labelled(self) -> bool:
        """Whether damage is a drop in accuracy; else it is KL."""
        return self.exits.accuracy is not None

    @property
    def choice(self) -> Choice:
        """The layers that the measurements speak for, and why."""
        return choose(
            self.measurements.vision_similarity,
            self.measurements.ilvas,
            self.exits,
            self.injections,
            tolerance=self.tolerance,
        )

    def schedule(
        self,
        *,
        average_vision_tokens: float | None = None,
        flops_share: float | None = None,
        kv_share: float | None = None,
        latency: float | None = None,
        trials: int = 40,
        objective: str = "kl",
    ) -> Schedule:
        """The best schedule for a budget that the measurements lead to.

        Inject and exit are read off the measurements. Of the concave pyramids that then fit the budget,
        those that ILVAS speaks for first, up to `trials` are run on the samples that are not held out
        and the least `objective` wins; without the model (after `load`), or with `trials=0`, it is the
        first of them. `decisions[-1]` tells the reasons.

        Args:
            average_vision_tokens: of one image, a layer, over all layers.
            flops_share: of the untouched model's prefill FLOPs, text included, in (0, 1].
            kv_share: of its KV bytes, text included, in (0, 1].
            latency: seconds of one sample's prefill on this machine, images encoded before.
            trials: pyramids to compare at most.
            objective: "kl", or "accuracy" (ties by KL) where there are labels.

        Raises:
            ScheduleError: not exactly one budget, or none of the pyramids can meet it; says what the
                cheapest costs.
        """
        self._check_objective(objective)
        trials = checked_int(trials, "trials", minimum=0)
        budget = budget_of(
            self.typical,
            average_vision_tokens=average_vision_tokens,
            flops_share=flops_share,
            kv_share=kv_share,
            latency=latency,
            seconds=None if self.bench is None else self.bench.latency,
        )
        with self._working():
            shapes, why = shapes_for(
                self.choice,
                budget,
                num_layers=self.num_layers,
                vision_tokens=self.typical.tokens_per_image,
            )
            found: dict[Schedule, str] = {}
            wanted = max(1, trials) if self.bench is not None else 1
            for shape in shapes:
                solved = solve(shape, budget)
                if solved is not None:
                    found.setdefault(solved, str(shape))
                if len(found) == wanted:
                    break
            if not found:
                raise ScheduleError(f"no pyramid keeps to {budget}; allow a little more")
            best = next(iter(found))
            if len(found) > 1:
                bench = self._bench("comparing pyramids")
                with self._bar("pyramids", len(found), bench.search) as tick:
                    losses = {s: self._loss(bench.search, s, objective, tick) for s in found}
                best = min(losses, key=losses.__getitem__)
            compared = (
                f"of {len(found)} pyramids that fit {budget} the one with the least {objective} on the "
                "samples not held out"
                if len(found) > 1
                else f"the first pyramid that fits {budget}; none was tried"
            )
            reasons = (*self.choice.reasons, *why, f"{found[best]}: {compared}")
            reasons += self._timing(best, budget)
            self._decide(best, "schedule", budget, reasons)
        return best

    def refine(
        self,
        schedule: Schedule | str,
        evaluations: int = 50,
        *,
        objective: str = "kl",
        seed: int | None = None,
        checkpoint: str | Path | None = None,
        **budget: float,
    ) -> Schedule:
        """Search around a schedule, inside its budget, for a better one.

        Random steps move tokens between layers and shift inject, filters and exit; a step is kept if it
        lowers the objective on the samples that are not held out. Of the improvements, the one that is
        best over all samples, held out or not, is returned: never worse there than the start. The same
        seed takes the same steps: a search that was cut short, or is run again
        with more `evaluations`, goes on from the outcomes known (`save` keeps them). Of a start with
        `selection="dtopk"` the counts are refined, and the result has them with `selection="hard"`.

        Args:
            evaluations: schedules to try, known ones included.
            objective: "kl", or "accuracy" (ties by KL) where there are labels.
            checkpoint: a JSON file to save to after every improvement.
            **budget: one of the budgets of `schedule`; without, the average vision tokens of the start.

        Raises:
            ScheduleError: the start does not fit the model or costs more than the budget.
            HidropError: no model is attached.
        """
        self._check_objective(objective)
        evaluations = checked_int(evaluations, "evaluations", minimum=0)
        if isinstance(schedule, str):
            schedule = Schedule.parse(schedule, self.num_layers)
        if not isinstance(schedule, Schedule):
            raise ScheduleError(
                f"schedule is a {type(schedule).__name__}; pass a hidrop_fx.Schedule, such as "
                'calibration.schedule(...) gives, or a string such as "inject=8,prune=10:215"'
            )
        schedule.validate(self.num_layers)
        schedule = with_counts(schedule)
        bench = self._bench("refine")
        limits = budget or {"average_vision_tokens": self._average(schedule)}
        limit = budget_of(self.typical, seconds=bench.latency, **limits)
        if not limit.allows(schedule):
            raise ScheduleError(
                f"the schedule to refine, {schedule}, costs {limit.cost(schedule):.4g} {limit.unit}".rstrip()
                + f", but the budget is {limit}: start from one inside it, such as "
                "calibration.schedule(...) gives"
            )
        improvements = [schedule]

        def note(candidate: Schedule, better: bool) -> None:
            if better:
                improvements.append(candidate)
                if checkpoint is not None:
                    self.save(checkpoint)

        with self._working(), self._bar("refine", evaluations + 1, bench.search) as tick:
            local_search(
                schedule,
                num_layers=self.num_layers,
                vision_tokens=self.typical.tokens_per_image,
                allowed=limit.allows,
                loss=lambda s: self._loss(bench.search, s, objective, tick),
                evaluations=evaluations,
                seed=self.seed if seed is None else seed,
                tick=note,
            )
            best = self._confirmed(bench, improvements, objective)
            reasons = (
                f"started from {schedule}",
                f"{evaluations} evaluations of {objective} with seed "
                f"{self.seed if seed is None else seed}, {len(improvements) - 1} improvements",
                f"improvement {improvements.index(best)} is the best over all samples, held out or not",
                *self._timing(best, limit),
            )
            self._decide(best, "refine", limit, reasons)
        if checkpoint is not None:
            self.save(checkpoint)
        return best

    def attach(
        self, model: Any, batches: Iterable[Mapping[str, Any]], *, backend: str = "eager"
    ) -> "Calibration":
        """Give a loaded calibration its model and samples again; returns itself.

        Raises:
            InputError: these are not the samples, or this is not the model, that it was made with.
            ScheduleError: the model has another depth.
        """
        check_backend(backend)
        with eval_mode(model):
            samples = prepare(model, batches, progress=self.progress)
            geometry = Geometry.from_model(model)
            if geometry != self.typical.geometry:
                raise ScheduleError(
                    f"this calibration is of a model with {self.typical.geometry}; the given one has {geometry}"
                )
            reference = full_model(model, samples)
            bench = Workbench(model, samples, reference, backend)
        if bench.digest != self.digest:
            raise InputError(
                f"these samples have the fingerprint {bench.digest}, the calibration was made with "
                f"{self.digest} ({self.samples} samples): pass the same batches, or calibrate anew"
            )
        apart = self._apart(sketch(reference))
        if apart > _SAME_MODEL:
            raise InputError(
                f"on the same samples the log-probabilities of the given {type(model).__name__} are "
                f"{apart:.0%} away from those of the calibrated model: its weights are others. Pass the "
                "model that was calibrated, or calibrate anew"
            )
        self.bench = bench
        for name, trials in self._parts(bench).items():
            known = self.outcomes.get(name, {})
            trials.done |= {Schedule.parse(text): outcome for text, outcome in known.items()}
        return self

    def table(self) -> str:
        """Measurements by layer, decisions and cost, as text."""
        from hidrop_fx.analysis.calibration.tables import tables

        return as_text(tables(self))

    def to_html(self) -> str:
        """The same as HTML without styles of its own, with the plot: a section for a page."""
        from hidrop_fx.analysis.calibration.plotting import png
        from hidrop_fx.analysis.calibration.tables import tables

        return (
            as_html(tables(self))
            + f'<img alt="calibration" src="data:image/png;base64,{png(self)}">'
        )

    def plot(self, path: str | Path | None = None, *, decision: int = -1) -> Any:
        """The curves with stages and chosen points; written as PNG where a path is given.

        Args: decision: which of `decisions` to show; without any, the layers of `choice`.

        Returns:
            the matplotlib figure.

        Raises:
            HidropError: matplotlib is not installed.
        """
        from hidrop_fx.analysis.calibration.plotting import draw

        figure = draw(self, decision)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and the samples, as what JSON can hold."""
        from hidrop_fx.analysis.calibration.storage import as_dict

        if self.bench is not None:
            for name, trials in self._parts(self.bench).items():
                known = {str(schedule): outcome for schedule, outcome in trials.done.items()}
                self.outcomes[name] = self.outcomes.get(name, {}) | known
        return as_dict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; missing folders are made."""
        fresh = Path(path).with_name(Path(path).name + ".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or it is no calibration of this version.
        """
        from hidrop_fx.analysis.calibration.storage import from_dict

        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read a calibration from {str(path)!r}: {error}") from error
        return from_dict(data, str(path))

    # What the public methods share.

    def _bench(self, what: str) -> Workbench:
        if self.bench is None:
            raise HidropError(
                f"{what} needs the model and the samples, which a loaded calibration has not: call "
                "calibration.attach(model, batches) first"
            )
        return self.bench

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Adds to time and passes, and keeps the model in eval mode meanwhile."""
        bench, started = self.bench, time.perf_counter()
        before = 0 if bench is None else bench.passes
        try:
            with nullcontext() if bench is None else eval_mode(bench.model):
                yield
        finally:
            self.seconds += time.perf_counter() - started
            self.passes += 0 if bench is None else bench.passes - before

    def _bar(self, what: str, runs: int, trials: Trials) -> AbstractContextManager[Tick]:
        return progress_bar(what, runs * trials.size, shown=self.progress)

    def _check_objective(self, objective: str) -> None:
        if objective not in OBJECTIVES:
            raise ScheduleError(f"objective={objective!r}: use one of {', '.join(OBJECTIVES)}")
        if objective == "accuracy" and not self.labelled:
            raise ScheduleError(
                "objective='accuracy' needs labels in the calibration batches, which had none: use 'kl'"
            )

    def _loss(
        self, trials: Trials, schedule: Schedule, objective: str, tick: Tick | None
    ) -> tuple[float, ...]:
        outcome = trials.run(schedule, tick)
        if objective == "accuracy":
            assert outcome.accuracy is not None
            return -outcome.accuracy, outcome.mean_kl
        return (outcome.mean_kl,)

    def _confirmed(
        self, bench: Workbench, improvements: list[Schedule], objective: str
    ) -> Schedule:
        """The improvement that does best over all samples, held out or not; the start is one of them.

        The held-out part alone is too small to judge by: one sample in it can outweigh the rest.
        """

        def loss(schedule: Schedule) -> tuple[float, ...]:
            outcomes = [trials.run(schedule) for trials in self._parts(bench).values()]
            kl = [value for outcome in outcomes for value in outcome.kl]
            right = [value for outcome in outcomes for value in outcome.right or ()]
            accuracy = (-sum(right) / len(right),) if objective == "accuracy" else ()
            return (*accuracy, sum(kl) / len(kl))

        return min(reversed(improvements), key=loss)

    def _apart(self, other: tuple[float, ...]) -> float:
        """How far another model's sketch is from the calibrated one's, as a share of its size."""
        pairs = zip(self.sketch, other, strict=True)
        size = sum(map(abs, self.sketch))
        return sum(abs(a - b) for a, b in pairs) / max(size, 1e-30)

    def _timing(self, schedule: Schedule, budget: Budget) -> tuple[str, ...]:
        """What was measured of a schedule under a latency budget, and how far its runs lay apart."""
        if self.bench is None or budget.name != "latency":
            return ()
        runs = self.bench.timings.get(schedule, ())
        if not runs:
            return ()
        return (
            f"latency {min(runs) * 1e3:.3g} ms, the fastest of {len(runs)} runs; the slowest took "
            f"{max(runs) * 1e3:.3g} ms. Differences below that are noise",
        )

    def _average(self, schedule: Schedule) -> float:
        return self.typical.plan(schedule, images=1).average_vision_tokens

    def _decide(
        self, schedule: Schedule, origin: str, budget: Budget, reasons: tuple[str, ...]
    ) -> None:
        parts = {} if self.bench is None else self._parts(self.bench)
        known = {name: trials.done.get(schedule) for name, trials in parts.items()}
        if known.get("search") is not None and "held_out" in parts:
            known["held_out"] = parts["held_out"].run(schedule)
        self.decisions.append(
            Decision(
                schedule=schedule,
                origin=origin,
                budget=str(budget),
                reasons=reasons,
                search=_score(known.get("search")),
                held_out=_score(known.get("held_out")),
            )
        )

    def _parts(self, bench: Workbench) -> dict[str, Trials]:
        parts = {"search": bench.search}
        return parts if bench.held_out is None else parts | {"held_out": bench.held_out}


def _score(outcome: Outcome | None) -> Score | None:
    if outcome is None:
        return None
    return Score(kl=outcome.mean_kl, accuracy=outcome.accuracy, samples=len(outcome.kl))


__all__ = ["OBJECTIVES", "Calibration", "Decision", "Score"]
