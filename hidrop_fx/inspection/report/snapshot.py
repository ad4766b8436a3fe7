"""A snapshot of a compiled model, as `inspect` returns it.

report = hidrop_fx.inspect(model)
print(report)                     # tables, see hidrop_fx.inspection.report.tables
report.layers[10].tokens          # what layer 10 ran on
report.to_dict()                  # all of it, for JSON
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hidrop_fx.inspection.report import tables
from hidrop_fx.inspection.report.records import BodyReport, ExecutableReport, LayerReport, Totals
from hidrop_fx.inspection.table import Report, Table
from hidrop_fx.lowering.compile_log import CompileEntry
from hidrop_fx.planning import Costs
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Inspection(Report):
    """A snapshot of a compiled model. `print` shows it as tables."""

    model: str
    """Name of the model's class."""
    schedule: Schedule
    backend: str
    plan: Costs
    """Before any call: the plan for a typical sample. Then: that of the row shown in `layers`."""
    row: int | None
    """The row of the last batch that `layers` shows; None before any call."""
    schedules: Mapping[str, str] = field(default_factory=dict)
    """Schedules that the model was compiled with, by name, the default one first."""
    passes: tuple[str, ...] = ()
    """Names of the user's own, in order."""
    deepstack: str = ""
    """Where the model adds features to vision tokens between its layers, in words; empty where it does not."""
    text_tokens: tuple[int, ...] = ()
    """Length of the text stream, row by row."""
    vision_tokens: tuple[int, ...] = ()
    """Vision tokens before anything is pruned, row by row."""
    images: tuple[int, ...] = ()
    """Images, row by row."""
    layers: tuple[LayerReport, ...] = ()
    totals: Totals | None = None
    identity: Totals | None = None
    """The totals of the untouched model for the same batch."""
    cache_bytes: int | None = None
    """Size of the buffers of the last KV cache: padding and room for new tokens included."""
    captures: tuple[float, ...] = ()
    """Seconds that each capture of the decoder took."""
    compiled: tuple[CompileEntry, ...] = ()
    """Every compilation so far."""
    bodies: tuple[BodyReport, ...] = ()
    executables: tuple[ExecutableReport, ...] = ()
    recompiles: tuple[str, ...] = ()
    """Every compilation of a body after its first, and why."""
    fallbacks: tuple[str, ...] = ()
    """What runs uncompiled although it should not, and why."""

    @property
    def called(self) -> bool:
        """True if there is a call to report on."""
        return self.row is not None

    @property
    def compile_seconds(self) -> float:
        """Time spent in the compiler so far."""
        return sum(entry.seconds or 0.0 for entry in self.compiled)

    @property
    def tables(self) -> list[Table]:
        """Tables that are printed."""
        if not self.called:
            return [self._heading(), self._plan(), *self._compilation()]
        assert self.totals is not None
        assert self.identity is not None
        return [
            self._heading(),
            self._layers(),
            tables.totals(self.totals, self.identity, len(self.text_tokens), self.cache_bytes),
            *self._compilation(),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {
            "model": self.model,
            "schedule": self.schedule.to_dict(),
            "schedules": dict(self.schedules),
            "backend": self.backend,
            "passes": list(self.passes),
            "deepstack": self.deepstack,
            "called": self.called,
            "plan": self.plan.to_dict(),
            "row": self.row,
            "text_tokens": list(self.text_tokens),
            "vision_tokens": list(self.vision_tokens),
            "images": list(self.images),
            "layers": [asdict(layer) for layer in self.layers],
            "totals": None if self.totals is None else asdict(self.totals),
            "identity": None if self.identity is None else asdict(self.identity),
            "cache_bytes": self.cache_bytes,
            "captures": list(self.captures),
            "compiled": [asdict(entry) for entry in self.compiled],
            "compile_seconds": self.compile_seconds,
            "bodies": [asdict(body) for body in self.bodies],
            "executables": [asdict(executable) for executable in self.executables],
            "recompiles": list(self.recompiles),
            "fallbacks": list(self.fallbacks),
        }

    def _heading(self) -> Table:
        notes = [f"schedule  {self.schedule}", f"backend   {self.backend}"]
        if len(self.schedules) > 1:
            named = (f"{name}: {schedule}" for name, schedule in self.schedules.items())
            notes.append(f"compiled  under {'; '.join(named)}")
        if self.passes:
            notes.append(f"passes    {', '.join(self.passes)}")
        if self.deepstack:
            notes.append(f"deepstack {self.deepstack}")
        if not self.called:
            notes.append("No call yet. Call generate or forward, then inspect again.")
        return Table(title=f"{self.model} compiled by hidrop_fx", notes=tuple(notes))

    def _plan(self) -> Table:
        _, *lines = str(self.plan).splitlines()
        return Table(title="Plan for a typical sample", notes=tuple(lines))

    def _layers(self) -> Table:
        row = self.row or 0
        return tables.layers(
            self.layers, self.text_tokens, self.vision_tokens, row=row, images=self.images[row]
        )

    def _compilation(self) -> list[Table]:
        found = []
        if self.captures:
            found.append(tables.captures(self.captures))
        if self.executables:
            found.append(tables.executables(self.executables))
        if self.bodies:
            found.append(tables.bodies(self.bodies))
        if self.called:
            found.append(tables.compiled(self.compiled, self.backend))
        if self.recompiles:
            found.append(Table(title="Compiled again", notes=self.recompiles))
        if self.fallbacks:
            found.append(Table(title="Fallbacks (slower, not wrong)", notes=self.fallbacks))
        return found
