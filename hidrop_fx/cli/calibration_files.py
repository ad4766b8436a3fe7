"""Run `hidrop calibrate`: load, calibrate, choose, write the files."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidrop_fx.analysis.calibration.calibration import Calibration
from hidrop_fx.analysis.calibration.run import calibrate
from hidrop_fx.analysis.data.records import batches_of, read_records, short_answers
from hidrop_fx.cli.calibration_options import CalibrationOptions
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.records import drawn_records
from hidrop_fx.errors import HidropError, InputError, ScheduleError
from hidrop_fx.models.loading import load_model
from hidrop_fx.schedule.schedule import Schedule

BUDGETS: dict[str, str] = {
    "average": "average_vision_tokens",
    "flops": "flops_share",
    "kv": "kv_share",
    "latency": "latency",
}
_BUDGET_HELP = (
    'write "64" or "average=64" (vision tokens a layer), "flops=0.25" or "kv=0.25" (share of the untouched '
    'model\'s), or "latency=0.05" (seconds a prompt)'
)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Result of the command, and the files it wrote."""

    calibration: Calibration
    schedule: Schedule
    files: tuple[Path, ...]


def parse_budget(text: str) -> dict[str, Any]:
    """Parse a budget into a keyword argument of `Calibration.schedule`: "kv=0.25" -> {"kv_share": 0.25}.

    Raises:
        ScheduleError: the text is no budget; says how to write one.
    """
    found = re.fullmatch(r"\s*(?:([a-z]+)\s*=)?\s*([0-9.]+(?:e-?[0-9]+)?)\s*", text)
    name = (found[1] or "average") if found else ""
    if found is None or name not in BUDGETS:
        raise ScheduleError(f"cannot read the budget {text!r}: {_BUDGET_HELP}")
    try:
        return {BUDGETS[name]: float(found[2])}
    except ValueError as error:
        raise ScheduleError(f"cannot read the budget {text!r}: {_BUDGET_HELP}") from error


def calibrate_files(options: CalibrationOptions, progress: Callable[[str], None]) -> Calibrated:
    """Calibrate a model on files; `schedule.json`, `calibration.json` and a plot go to `output`.

    Raises:
        HidropError: no such model or data, or an output folder that cannot be written.
    """
    limits = parse_budget(options.budget)
    shipped = options.model is None
    if options.data is None and not shipped:
        raise InputError(
            "--data is missing: only the shipped model brings data of its own. Pass a LLaVA-format "
            "JSON file with --images DIR, or a folder of images with a prompts.txt"
        )
    records = (
        drawn_records(options.samples)
        if options.data is None
        else read_records(
            options.data, images=options.images, prompts=options.prompts, limit=options.samples
        )
    )
    _writable(options.output)
    labelled = short_answers(records) if options.answers is None else options.answers
    progress(f"loading {options.model or 'the shipped model'}")
    model, processor = load_model(
        options.model or MODEL_DIR, device=options.device, dtype=options.dtype
    )
    progress(f"calibrating on {len(records)} samples {'with' if labelled else 'without'} answers")
    found = calibrate(
        model,
        batches_of(model, processor, records, batch_size=options.batch_size, answers=labelled),
        tolerance=options.tolerance,
        backend=options.backend,
        seed=options.seed,
        progress=False,
    )
    if shipped:
        found.model = "the shipped model"
    progress("choosing a schedule")
    schedule = found.schedule(trials=options.trials, methods=options.methods or None, **limits)
    if options.refine:
        progress(f"refining it, {options.refine} evaluations")
        schedule = found.refine(schedule, options.refine, **limits)
    files = _write(found, schedule, options.output)
    return Calibrated(calibration=found, schedule=schedule, files=files)


def report(done: Calibrated) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "schedule": done.schedule.to_dict(),
        "text": str(done.schedule),
        "files": [str(path) for path in done.files],
        "calibration": {k: v for k, v in done.calibration.to_dict().items() if k != "outcomes"},
    }


def _writable(output: Path) -> None:
    """Create the output folder before the calibration, which may take hours."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --output {output}: {error}") from error


def _write(calibration: Calibration, schedule: Schedule, output: Path) -> tuple[Path, ...]:
    files = [output / "schedule.json", output / "calibration.json", output / "calibration.png"]
    files[0].write_text(schedule.to_json() + "\n", encoding="utf-8")
    calibration.save(files[1])
    try:
        calibration.plot(files[2])
    except HidropError:  # matplotlib is optional
        files.pop()
    return tuple(files)
