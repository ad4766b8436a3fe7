"""The record of a calibration: measurements, sweeps, decisions, and the trials behind them.

Storage, tables and the plot read it; `Calibration` adds the verbs.
"""

from dataclasses import dataclass, field

from hidrop_fx.analysis.choosing.layer_choice import Choice, choose
from hidrop_fx.analysis.data.typical_sample import TypicalSample
from hidrop_fx.analysis.measuring.layers import Measurements
from hidrop_fx.analysis.measuring.sweeps import Sweep
from hidrop_fx.analysis.searching.trials import Outcome
from hidrop_fx.analysis.searching.workbench import Workbench
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over the samples of one part, under one schedule."""

    kl: float
    """Nats, of the next token, from the full model."""
    accuracy: float | None
    """Share of samples answered right; None without labels."""
    samples: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of the methods that were held against each other for a decision."""

    name: str
    schedule: Schedule
    cost: float
    """In the budget's unit."""
    search: Score | None
    held_out: Score | None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A schedule that was chosen or refined, and how that came about."""

    schedule: Schedule
    origin: str
    """"schedule", "methods", "withdrawal" or "refine"."""
    budget: str
    reasons: tuple[str, ...]
    search: Score | None
    """On the samples it was chosen on; None if it was not tried."""
    held_out: Score | None
    """On the others; None if there are none."""
    candidates: tuple[Candidate, ...] = ()
    """Of "methods", best first."""


@dataclass(kw_only=True)
class CalibrationRecord:
    """Measurements of one model on some samples, and the schedules chosen from them."""

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
    """Damage that a choice may do, as a share of the worst of both sweeps."""
    seed: int
    passes: int
    """Calls of the decoder so far, one batch each."""
    seconds: float
    """Wall time so far."""
    sketch: tuple[float, ...]
    """Of the untouched model's log-probabilities: tells one set of weights from another."""
    decisions: list[Decision] = field(default_factory=list)
    bench: Workbench | None = field(default=None, repr=False, compare=False)
    """Model and samples; None after `load`, until `attach`."""
    progress: bool = field(default=False, repr=False, compare=False)
    """Show bars on stderr."""
    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict, repr=False)
    """Of every schedule tried in `schedule` and `refine`: part -> text form -> outcome."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.typical.geometry.num_layers

    @property
    def labelled(self) -> bool:
        """True if damage is a drop in accuracy; else it is KL."""
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
