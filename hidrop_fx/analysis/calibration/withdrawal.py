"""Find the layer at which all vision tokens may leave, by VTW's own rule.

    for k in range(start, L):
        if mean KL(schedule exit=k || full model) <= eta: return k        # of the token behind the prompt

Lin et al., VTW, AAAI 2025: from layer 5 on, eta 0.003 (0.0001 for LLaVA-1.6-7B), by the next token of each sample. The exits of a
calibration's own choice are judged by accuracy or by the other direction of the divergence.
"""

import math

from hidrop_fx.analysis.calibration.decisions import accounted, bench_of, note_decision, trials_bar
from hidrop_fx.analysis.calibration.record import CalibrationRecord
from hidrop_fx.analysis.choosing.budgets import Budget
from hidrop_fx.errors import ScheduleError
from hidrop_fx.schedule.keeps import checked_int
from hidrop_fx.schedule.schedule import Schedule


def find_withdrawal(record: CalibrationRecord, *, eta: float, start: int) -> Schedule:
    """Return the earliest exit from `start` on whose divergence is at most `eta` nats, and note the decision.

    Raises:
        ScheduleError: eta is no bound, start no layer, or no exit is within eta; says which came closest.
        HidropError: no model is attached.
    """
    start = checked_int(start, "start", minimum=1)
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 < eta < math.inf:
        raise ScheduleError(f"eta={eta!r}: use a bound in nats above 0, as VTW's 0.003")
    layers = range(start, record.num_layers)
    if not layers:
        raise ScheduleError(
            f"start={start} but the model has {record.num_layers} layers: start below the last of them"
        )
    trials = bench_of(record, "a withdrawal").all
    found: dict[int, float] = {}
    with accounted(record), trials_bar(record, "withdrawals", len(layers), trials) as tick:
        for layer in layers:
            divergences = trials.next_token_divergences(Schedule(exit=layer), tick)
            found[layer] = sum(divergences) / len(divergences)
            if found[layer] <= eta:
                break
        layer = min(found, key=found.__getitem__)
        if found[layer] > eta:
            raise ScheduleError(
                f"no exit from layer {start} on is within eta={eta}; the closest is layer {layer} with "
                f"{found[layer]:.4g} nats: allow more"
            )
        schedule = Schedule(exit=layer)
        limit = Budget(name="eta", limit=eta, unit="nats", cost=lambda schedule: found[layer])
        curve = ", ".join(f"{value:.4g} at {k}" for k, value in found.items())
        reasons = (
            f"KL of the next token from the full model's, mean over {trials.size} samples: {curve}",
        )
        note_decision(record, schedule, "withdrawal", limit, reasons)
    return schedule
