"""Calibrations as JSON, and back.

write_json("calibration.json", as_dict(calibration))
calibration = Calibration(**read_fields("calibration.json"))      # without model and samples
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hidrop_fx.analysis.calibration.record import (
    CalibrationRecord,
    Candidate,
    Decision,
    Score,
)
from hidrop_fx.analysis.data.typical_sample import TypicalSample
from hidrop_fx.analysis.measuring.attention_similarity import IlvasCurve
from hidrop_fx.analysis.measuring.layers import Measurements
from hidrop_fx.analysis.measuring.sweeps import Sweep
from hidrop_fx.analysis.searching.trials import Outcome
from hidrop_fx.errors import InputError
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.schedule.schedule import Schedule

_FORMAT = 2
_PLAIN = ("model", "samples", "digest", "tolerance", "seed", "passes", "seconds")


def as_dict(calibration: CalibrationRecord) -> dict[str, Any]:
    """Return measurements, choice, decisions and the outcomes of all trials."""
    return {
        "format": _FORMAT,
        **{name: getattr(calibration, name) for name in _PLAIN},
        "sketch": list(calibration.sketch),
        "typical": asdict(calibration.typical),
        "measurements": asdict(calibration.measurements),
        "exits": asdict(calibration.exits),
        "injections": asdict(calibration.injections),
        "choice": asdict(calibration.choice),
        "decisions": [_decision_as_dict(decision) for decision in calibration.decisions],
        "outcomes": {
            part: {text: asdict(outcome) for text, outcome in found.items()}
            for part, found in calibration.outcomes.items()
        },
    }


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write a file whole or not at all; missing folders are made."""
    fresh = Path(path).with_name(Path(path).name + ".new")
    fresh.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_text(json.dumps(data, indent=1), encoding="utf-8")
    fresh.replace(path)


def read_fields(path: str | Path) -> dict[str, Any]:
    """Read the fields of a calibration from the JSON that `as_dict` made.

    Raises:
        InputError: no such file, or it holds something else or another version.
    """
    source = str(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read a calibration from {source!r}: {error}") from error
    if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise InputError(
            f"{source!r} is no calibration of this version (format {found!r}, not {_FORMAT}): "
            "calibrate again"
        )
    try:
        return _fields(data)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the calibration in {source!r} is damaged ({error!r})") from error


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    typical = dict(data["typical"])
    typical["geometry"] = Geometry(**typical["geometry"])
    measured = _tuples(data["measurements"])
    measured["ilvas"] = tuple(IlvasCurve(**_tuples(curve)) for curve in measured["ilvas"])
    return {
        **{name: data[name] for name in _PLAIN},
        "typical": TypicalSample(**typical),
        "measurements": Measurements(**measured),
        "exits": Sweep(**_tuples(data["exits"])),
        "injections": Sweep(**_tuples(data["injections"])),
        "sketch": tuple(data["sketch"]),
        "decisions": [_decision(one) for one in data["decisions"]],
        "outcomes": {
            part: {text: Outcome(**_tuples(one)) for text, one in found.items()}
            for part, found in data["outcomes"].items()
        },
    }


def _decision_as_dict(decision: Decision) -> dict[str, Any]:
    plain = {name: getattr(decision, name) for name in ("origin", "budget", "reasons")}
    scores = {name: getattr(decision, name) for name in ("search", "held_out")}
    candidates = [
        {**asdict(one), "schedule": one.schedule.to_dict()} for one in decision.candidates
    ]
    return {
        "schedule": decision.schedule.to_dict(),
        "candidates": candidates,
        **plain,
        **{name: None if score is None else asdict(score) for name, score in scores.items()},
    }


def _decision(data: Mapping[str, Any]) -> Decision:
    return Decision(
        origin=data["origin"],
        budget=data["budget"],
        reasons=tuple(data["reasons"]),
        candidates=tuple(
            Candidate(name=one["name"], cost=one["cost"], **_scored(one))
            for one in data.get("candidates", ())
        ),
        **_scored(data),
    )


def _scored(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read a schedule and its scores."""
    scores = {
        name: None if data[name] is None else Score(**data[name]) for name in ("search", "held_out")
    }
    return {"schedule": Schedule.from_json(json.dumps(data["schedule"])), **scores}


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
