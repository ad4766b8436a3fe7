"""The result of `replay`: a line a stage, and the pass at fault."""

from dataclasses import dataclass
from typing import Any

from hidrop_fx.inspection.comparison.differences import LayerDifference, ValueDifference
from hidrop_fx.inspection.comparison.result import COLUMNS, difference_row
from hidrop_fx.inspection.table import Report, Table


@dataclass(frozen=True, kw_only=True)
class StageReplay:
    """One stage, run again."""

    name: str
    """Of the pass."""
    layers: tuple[LayerDifference, ...]
    """Empty if the stage failed."""
    error: str = ""
    """Why it failed."""
    loss: ValueDifference | None = None
    gradients: tuple[ValueDifference, ...] = ()
    """Of every parameter, in a train program that labels came for."""

    @property
    def first(self) -> LayerDifference | None:
        """The first layer that departs."""
        return next((layer for layer in self.layers if layer.departs), None)

    @property
    def ok(self) -> bool:
        """True if it ran, and nothing departs."""
        return not self.error and self.first is None and self.departing is None

    @property
    def departing(self) -> ValueDifference | None:
        """The loss, or the departing gradient nearest to it; None where all agree."""
        values = (*self.gradients, *([self.loss] if self.loss else []))
        return next((value for value in reversed(values) if value.departs), None)


@dataclass(frozen=True, kw_only=True)
class Replay(Report):
    """All stages of one program, run again."""

    program: str
    stages: tuple[StageReplay, ...]

    @property
    def first(self) -> StageReplay | None:
        """The first stage that departs: its pass is at fault."""
        return next((stage for stage in self.stages if not stage.ok), None)

    @property
    def ok(self) -> bool:
        """True if every stage computes what it should."""
        return self.first is None

    @property
    def tables(self) -> list[Table]:
        """Tables that are printed."""
        rows = tuple(_row(stage) for stage in self.stages)
        columns = ("<stage", "<first layer that departs", "largest", "<")
        overview = Table(title=self._verdict(), columns=columns, rows=rows)
        if self.first is None or not self.first.layers:
            return [overview]
        detail = tuple(difference_row(layer) for layer in self.first.layers)
        title = f"Hidden states after {self.first.name}"
        return [overview, Table(title=title, columns=COLUMNS, rows=detail)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {
            "ok": self.ok,
            "program": self.program,
            "first": None if self.first is None else self.first.name,
            "stages": [
                {
                    "name": stage.name,
                    "ok": stage.ok,
                    "error": stage.error,
                    "layers": [layer.to_dict() for layer in stage.layers],
                    "loss": None if stage.loss is None else stage.loss.to_dict(),
                    "gradients": [gradient.to_dict() for gradient in stage.gradients],
                }
                for stage in self.stages
            ],
        }

    def _verdict(self) -> str:
        if self.first is None:
            return f"{self.program}: every stage computes what it should"
        if self.first.error:
            return f"{self.program}: {self.first.name} cannot be run: {self.first.error}"
        layer, value = self.first.first, self.first.departing
        if layer is None:
            assert value is not None
            what = "" if value.name == "loss" else "the gradient of "
            return (
                f"{self.program}: {self.first.name} is at fault: {what}{value.name} differs by "
                f"{value.relative:.1e} of its largest value"
            )
        return f"{self.program}: {self.first.name} is at fault: {layer.region} {layer.reason}"


def _row(stage: StageReplay) -> tuple[str, ...]:
    if stage.error:
        return stage.name, "-", "-", stage.error
    worst = max(stage.layers, key=lambda layer: layer.relative)
    if stage.first is None:
        value = stage.departing
        note = "" if value is None else f"{value.name} departs by {value.relative:.1e}"
        return stage.name, "none", f"{worst.relative:.1e}", note
    return stage.name, stage.first.region, f"{worst.relative:.1e}", stage.first.reason
