"""A calibration, and the schedules it leads to.

    calibration = hidrop.calibrate(model, batches)
    schedule = calibration.schedule(average_vision_tokens=64)
    schedule = calibration.refine(schedule, evaluations=50)
    print(calibration.table()); calibration.plot("calibration.png"); calibration.save("calibration.json")

A calibration read from a file knows its measurements and decisions; `attach` gives it the model and the
samples again, which `refine`, latency budgets and the comparison of pyramids need.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hidrop_fx.analysis.calibration.attachment import attach_bench
from hidrop_fx.analysis.calibration.decisions import OBJECTIVES
from hidrop_fx.analysis.calibration.methods import compare_methods
from hidrop_fx.analysis.calibration.plotting import draw, png
from hidrop_fx.analysis.calibration.record import CalibrationRecord, Decision, Score
from hidrop_fx.analysis.calibration.refinement import refine_schedule
from hidrop_fx.analysis.calibration.selection import select_schedule
from hidrop_fx.analysis.calibration.storage import as_dict, read_fields, write_json
from hidrop_fx.analysis.calibration.tables import tables
from hidrop_fx.analysis.calibration.withdrawal import find_withdrawal
from hidrop_fx.inspection.table import as_html, as_text
from hidrop_fx.schedule.schedule import Schedule


class Calibration(CalibrationRecord):
    """Measurements of one model on some samples. Made by `hidrop_fx.calibrate` or `load`."""

    def schedule(
        self,
        *,
        average_vision_tokens: float | None = None,
        flops_share: float | None = None,
        kv_share: float | None = None,
        latency: float | None = None,
        methods: Sequence[Schedule | str] | None = None,
        trials: int = 40,
        objective: str = "kl",
    ) -> Schedule:
        """Return the best schedule for a budget that the measurements lead to.

        Inject and exit are read off the measurements. Of the concave pyramids that then fit the budget,
        those that ILVAS speaks for first, up to `trials` are run on the samples that are not held out
        and the least `objective` wins; without the model (after `load`), or with `trials=0`, it is the
        first of them. `decisions[-1]` tells the reasons.

        Args:
            average_vision_tokens: of one image, a layer, over all layers.
            flops_share: of the untouched model's prefill FLOPs, text included, in (0, 1].
            kv_share: of its KV bytes, text included, in (0, 1].
            latency: seconds of one sample's prefill on this machine, images encoded before.
            methods: candidates that are scaled to the budget and run on the samples, beside or in place of the
                pyramid: "hidrop" for the pyramid, a method's name or text ("fastv(layer=1)"), a `Schedule`, or a
                reducer in front of the pyramid ("divprune+hidrop"). The least `objective` wins;
                `decisions[-1].candidates`, `table()` and `plot()` show all. None for the pyramid alone.
            trials: pyramids to compare at most.
            objective: "kl", or "accuracy" (ties by KL) where there are labels.

        Raises:
            ScheduleError: not exactly one budget, or none of the pyramids can meet it; says what the
                cheapest costs.
        """
        limits = {
            "average_vision_tokens": average_vision_tokens,
            "flops_share": flops_share,
            "kv_share": kv_share,
            "latency": latency,
        }
        select = partial(select_schedule, self, limits, trials=trials, objective=objective)
        if methods is None:
            return select()
        return compare_methods(self, methods, select, limits, objective=objective)

    def withdrawal(self, *, eta: float = 0.003, start: int = 5) -> Schedule:
        """Return the schedule of VTW's own search: the first layer from which on no vision token is missed.

        Args:
            eta: bound in nats of KL(exit there || full model) of the token behind each prompt, mean over the samples.
            start: the first layer that is tried.

        Raises:
            ScheduleError: no exit is within `eta`; says which came closest.
            HidropError: no model is attached.
        """
        return find_withdrawal(self, eta=eta, start=start)

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

        def save() -> None:
            if checkpoint is not None:
                self.save(checkpoint)

        best = refine_schedule(
            self,
            schedule,
            evaluations,
            objective=objective,
            seed=seed,
            limits=budget,
            on_improvement=save,
        )
        save()
        return best

    def attach(
        self, model: Any, batches: Iterable[Mapping[str, Any]], *, backend: str = "eager"
    ) -> "Calibration":
        """Give a loaded calibration its model and samples again; return itself.

        Raises:
            InputError: these are not the samples, or this is not the model, that it was made with.
            ScheduleError: the model has another depth.
        """
        attach_bench(self, model, batches, backend)
        return self

    def table(self) -> str:
        """Return measurements by layer, decisions and cost as text."""
        return as_text(tables(self))

    def to_html(self) -> str:
        """Return tables and plot as HTML without styles of its own: a section for a page."""
        return (
            as_html(tables(self))
            + f'<img alt="calibration" src="data:image/png;base64,{png(self)}">'
        )

    def plot(self, path: str | Path | None = None, *, decision: int = -1) -> Any:
        """Draw the curves with stages and chosen points; write them as PNG where a path is given.

        Args:
            decision: index into `decisions`; without any, the layers of `choice` are shown.

        Returns:
            the matplotlib figure.

        Raises:
            HidropError: matplotlib is not installed.
        """
        figure = draw(self, decision)
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure

    def _repr_html_(self) -> str:
        return self.to_html()

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model and the samples, in JSON types."""
        if self.bench is not None:
            for name, trials in self.bench.parts.items():
                known = {str(schedule): outcome for schedule, outcome in trials.done.items()}
                self.outcomes[name] = self.outcomes.get(name, {}) | known
        return as_dict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all; missing folders are made."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a calibration that `save` wrote.

        Raises:
            InputError: no such file, or it is no calibration of this version.
        """
        return cls(**read_fields(path))


__all__ = ["OBJECTIVES", "Calibration", "Decision", "Score"]
