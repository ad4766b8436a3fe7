"""Exit sweep and injection sweep: the damage of leaving vision out of the last or the first layers.

    exit_sweep[k]      = trials.run(Schedule(exit=k))       # layers k .. L-1 see no vision
    injection_sweep[k] = trials.run(Schedule(inject=k))     # layers 0 .. k-1 see none

A sweep is deep to shallow: it begins with the untouched model.
"""

from dataclasses import dataclass

from hidrop_fx.analysis.progress_bar import Tick
from hidrop_fx.analysis.searching.trials import Outcome, Trials
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Damage by the layer of one event, mean over the samples."""

    layers: tuple[int, ...]
    kl: tuple[float, ...]
    """KL(full model || schedule) of the next token, in nats."""
    accuracy: tuple[float, ...] | None
    """Share of samples answered right; None without labels."""
    full_accuracy: float | None
    """The same of the full model."""

    @property
    def damage(self) -> tuple[float, ...]:
        """Drop in accuracy where there are labels, else the KL: what layers are chosen by."""
        if self.accuracy is None or self.full_accuracy is None:
            return self.kl
        return tuple(self.full_accuracy - share for share in self.accuracy)


def exit_sweep(trials: Trials, num_layers: int, tick: Tick | None = None) -> Sweep:
    """Run exits at layers 1 .. L; an exit at L is none."""
    layers = range(num_layers, 0, -1)
    outcomes = [trials.run(_without(Schedule(exit=k), num_layers), tick) for k in layers]
    return _sweep(list(layers), outcomes, trials)


def injection_sweep(trials: Trials, num_layers: int, tick: Tick | None = None) -> Sweep:
    """Run injections at layers 0 .. L - 1."""
    layers = range(num_layers - 1, -1, -1)
    outcomes = [trials.run(Schedule(inject=k), tick) for k in layers]
    return _sweep(list(layers), outcomes, trials)


def _without(schedule: Schedule, num_layers: int) -> Schedule:
    return Schedule() if schedule.exit == num_layers else schedule


def _sweep(layers: list[int], outcomes: list[Outcome], trials: Trials) -> Sweep:
    pairs = sorted(zip(layers, outcomes, strict=True), key=lambda pair: pair[0])
    shares = [outcome.accuracy for _, outcome in pairs]
    return Sweep(
        layers=tuple(layer for layer, _ in pairs),
        kl=tuple(outcome.mean_kl for _, outcome in pairs),
        accuracy=None if None in shares else tuple(s for s in shares if s is not None),
        full_accuracy=trials.run(Schedule()).accuracy,
    )
