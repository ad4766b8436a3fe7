"""What `inspect` returns: a snapshot of a compiled model.

report = hidrop_fx.inspect(model)
print(report)                     # tables, see hidrop_fx.inspection.table
report.layers[10].tokens          # what layer 10 ran on
report.to_dict()                  # all of it, for JSON
"""

from dataclasses import asdict, dataclass
from typing import Any

from hidrop_fx.inspection.table import Report, Table, tables
from hidrop_fx.lowering.compile_log import CompileEntry
from hidrop_fx.planning import Costs
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One decoder layer, for one row of the last prompt."""

    layer: int
    region: str
    """Module path in the model."""
    segment: str
    """The token set that it sees: "start", "text", "inject 8", "prune 10", "exit 24"."""
    tokens: int
    """Tokens that it runs on, padding excluded."""
    vision_tokens: int
    """Vision tokens among them."""
    kv_length: int | None
    """Places that the prompt takes in its KV cache, for every row; None if there is no cache."""
    flops: int
    """Of this row, scoring included."""
    kv_bytes: int = 0
    """K and V of this row's tokens."""
    inserted: str = ""
    """Nodes that passes put before and into it, e.g. "prune 74, attention 1"."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all layers and all rows; `flops` and `kv_bytes` as `Costs` defines them."""

    token_layers: int
    flops: int
    kv_bytes: int
    """Of the prompt's own tokens: no padding, no room for new ones."""


@dataclass(frozen=True, kw_only=True)
class BodyReport:
    """A layer body, and the subgraphs of programs that share it."""

    name: str
    serves: str
    """E.g. "prefill layers 0-7, 24-31"."""


@dataclass(frozen=True, kw_only=True)
class ExecutableReport:
    """A program that can be called."""

    name: str
    """Purpose and variant, e.g. "prefill", "decode-masked"."""
    serves: str
    """The inputs it is for."""
    calls: int
    bodies: int
    """Compiled functions that it calls."""
    seconds: float
    """Spent compiling those; functions shared with another program count in both."""
    cuda_graph: str
    """"yes", or why not."""


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
    passes: tuple[str, ...] = ()
    """Names of the user's own, in order."""
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
        """Whether there is a call to report on."""
        return self.row is not None

    @property
    def compile_seconds(self) -> float:
        """Time spent in the compiler so far."""
        return sum(entry.seconds or 0.0 for entry in self.compiled)

    @property
    def tables(self) -> list[Table]:
        """What is printed, table by table."""
        return tables(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as what JSON can hold."""
        return {
            "model": self.model,
            "schedule": self.schedule.to_dict(),
            "backend": self.backend,
            "passes": list(self.passes),
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
