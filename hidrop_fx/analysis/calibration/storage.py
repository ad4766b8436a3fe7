"""Calibrations as what JSON can hold, and back.

data = as_dict(calibration)
calibration = from_dict(data, "calibration.json")       # without model and samples
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hidrop_fx.analysis.calibration.calibration import Calibration, Decision, Score
from hidrop_fx.analysis.choosing.budgets import TypicalSample
from hidrop_fx.analysis.measuring.ilvas import IlvasCurve
from hidrop_fx.analysis.measuring.layers import Measurements
from hidrop_fx.analysis.measuring.sweeps import Sweep
from hidrop_fx.analysis.searching.trials import Outcome
from hidrop_fx.errors import InputError
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.schedule.schedule import Schedule

_FORMAT = 2
_PLAIN = ("model", "samples", "digest", "tolerance", "seed", "passes", "seconds")


def as_dict(calibration: Calibration) -> dict[str, Any]:
    """Measurements, choice, decisions and the outcomes of all trials."""
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


def from_dict(data: Any, source: str) -> Calibration:
    """What `as_dict` made.

    Raises:
        InputError: it is something else, or of another version; names the `source`.
    """
    if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise InputError(
            f"{source!r} is no calibration of this version (format {found!r}, not {_FORMAT}): "
            "calibrate again"
        )
    try:
        return _calibration(data)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the calibration in {source!r} is damaged ({error!r})") from error


def _calibration(data: Mapping[str, Any]) -> Calibration:
    typical = dict(data["typical"])
    typical["geometry"] = Geometry(**typical["geometry"])
    measured = _tuples(data["measurements"])
    measured["ilvas"] = tuple(IlvasCurve(**_tuples(curve)) for curve in measured["ilvas"])
    return Calibration(
        **{name: data[name] for name in _PLAIN},
        typical=TypicalSample(**typical),
        measurements=Measurements(**measured),
        exits=Sweep(**_tuples(data["exits"])),
        injections=Sweep(**_tuples(data["injections"])),
        sketch=tuple(data["sketch"]),
        decisions=[_decision(one) for one in data["decisions"]],
        outcomes={
            part: {text: Outcome(**_tuples(one)) for text, one in found.items()}
            for part, found in data["outcomes"].items()
        },
    )


def _decision_as_dict(decision: Decision) -> dict[str, Any]:
    plain = {name: getattr(decision, name) for name in ("origin", "budget", "reasons")}
    scores = {name: getattr(decision, name) for name in ("search", "held_out")}
    return {
        "schedule": decision.schedule.to_dict(),
        **plain,
        **{name: None if score is None else asdict(score) for name, score in scores.items()},
    }


def _decision(data: Mapping[str, Any]) -> Decision:
    scores = {
        name: None if data[name] is None else Score(**data[name]) for name in ("search", "held_out")
    }
    return Decision(
        schedule=Schedule.from_json(json.dumps(data["schedule"])),
        origin=data["origin"],
        budget=data["budget"],
        reasons=tuple(data["reasons"]),
        **scores,
    )


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
