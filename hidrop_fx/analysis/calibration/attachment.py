"""Attach model and samples to a calibration read from a file, after checking that they are the same."""

from collections.abc import Iterable, Mapping
from typing import Any

from hidrop_fx.analysis.calibration.record import CalibrationRecord
from hidrop_fx.analysis.data.samples import prepare_samples
from hidrop_fx.analysis.measuring.hooked_decoder import eval_mode
from hidrop_fx.analysis.measuring.layers import full_model, sketch
from hidrop_fx.analysis.searching.trials import check_backend
from hidrop_fx.analysis.searching.workbench import Workbench
from hidrop_fx.errors import InputError, ScheduleError
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.schedule.schedule import Schedule

# Beyond what another device or kernel changes, and below what another training does.
_SAME_MODEL = 0.01


def attach_bench(
    record: CalibrationRecord, model: Any, batches: Iterable[Mapping[str, Any]], backend: str
) -> None:
    """Give a record its model and samples, with the outcomes that it knows.

    Raises:
        InputError: these are not the samples, or this is not the model, that it was made with.
        ScheduleError: the model has another depth.
    """
    check_backend(backend)
    with eval_mode(model):
        samples = prepare_samples(model, batches, progress=record.progress)
        geometry = Geometry.from_model(model)
        if geometry != record.typical.geometry:
            raise ScheduleError(
                f"this calibration is of a model with {record.typical.geometry}; the given one has {geometry}"
            )
        reference = full_model(model, samples)
        bench = Workbench(model, samples, reference, backend)
    if bench.digest != record.digest:
        raise InputError(
            f"these samples have the fingerprint {bench.digest}, the calibration was made with "
            f"{record.digest} ({record.samples} samples): pass the same batches, or calibrate anew"
        )
    apart = _distance(record.sketch, sketch(reference))
    if apart > _SAME_MODEL:
        raise InputError(
            f"on the same samples the log-probabilities of the given {type(model).__name__} are "
            f"{apart:.0%} away from those of the calibrated model: its weights are others. Pass the "
            "model that was calibrated, or calibrate anew"
        )
    record.bench = bench
    for name, trials in bench.parts.items():
        known = record.outcomes.get(name, {})
        trials.done |= {Schedule.parse(text): outcome for text, outcome in known.items()}


def _distance(sketch: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the sum of absolute differences as a share of the first sketch's size."""
    pairs = zip(sketch, other, strict=True)
    size = sum(map(abs, sketch))
    return sum(abs(a - b) for a, b in pairs) / max(size, 1e-30)
