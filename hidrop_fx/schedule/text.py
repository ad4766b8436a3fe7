"""Text forms of a schedule: one for a command line, and JSON.

inject=8,prune=10:215+14:10,exit=24
{"inject": 8, "prune": {"10": 215, "14": 10}, "exit": 24}
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods.call_text import split_outside_brackets
from hidrop_fx.schedule.presets import PRESETS

GRAMMAR = (
    'write "inject=8,prune=10:215+14:10,exit=24" (any of inject=LAYER, '
    "prune=LAYER:KEEP+LAYER:KEEP+..., per=item, tile, frame or sample, exit=LAYER or none, average=NUMBER, before=NAME(...), cache=NAME(...), reads=LAYER+LAYER+... with freeze_system=true, bottleneck=TOKEN_ID, score=NAME, scoring=agnostic, positions=NAME, rounding=NAME, deepstack=skip, merge=NAME, selection=dtopk "
    "with rank=NAME and budget_weight=NUMBER; a KEEP with a decimal point or an exponent is a "
    "fraction, else tokens per item), or the path of a JSON file, or one of the presets "
    f'{", ".join(PRESETS)}; a method\'s may have arguments: "fastv(layer=2,keep=0.5)"'
)


def json_fields(text: str, known: Sequence[str], example: str) -> dict[str, Any]:
    """Read the fields of a schedule from a JSON object with no other keys than those `known`."""
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ScheduleError(
            f"not JSON ({error}): {text[:80]!r}; write an object such as {example}"
        ) from error
    if not isinstance(data, dict):
        raise ScheduleError(
            f"a schedule in JSON must be an object with the keys {', '.join(known)}, not {data!r}"
        )
    unknown = [key for key in data if key not in known]
    if unknown:
        raise ScheduleError(
            f"unknown key {', '.join(map(repr, unknown))} in the schedule: the keys are {', '.join(known)}"
        )
    if isinstance(data.get("prune"), dict):
        pairs = [(_json_layer(layer), keep) for layer, keep in data["prune"].items()]
        data["prune"] = _unique_keys(pairs)
    return data


def is_file(text: str) -> bool:
    """Return True if a text is the path of a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a file name may be, or with a null character
        return False


def read_text(path: str) -> str:
    """Read the contents of a schedule's file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ScheduleError(f"cannot read a schedule from {path!r} ({error}): {GRAMMAR}") from error


def parse_fields(text: str) -> dict[str, Any]:
    """Read the fields of a schedule from "inject=8,prune=10:215+14:10,exit=24"."""
    values: dict[str, Any] = {}
    for part in split_outside_brackets(text):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise _grammar_error(part.strip(), text)
        if name in values:
            raise _grammar_error(f"{name} given twice", text)
        match name:
            case "inject" | "bottleneck":
                values[name] = _parse_layer(value, text)
            case "exit":
                values[name] = None if value == "none" else _parse_layer(value, text)
            case "prune":
                values[name] = _parse_prune(value, text)
            case (
                "before"
                | "cache"
                | "score"
                | "scoring"
                | "positions"
                | "rounding"
                | "per"
                | "deepstack"
                | "merge"
                | "selection"
                | "rank"
            ):
                values[name] = value
            case "reads":
                values[name] = tuple(
                    _parse_layer(layer.strip(), text) for layer in value.split("+")
                )
            case "freeze_system" if value in ("true", "false"):
                values[name] = value == "true"
            case "average":
                values[name] = _parse_average(value, text)
            case "budget_weight":
                values[name] = _parse_number(value, text)
            case _:
                raise _grammar_error(name, text)
    return values


def written(value: Any) -> str:
    """Write a field's value as `parse_fields` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "+".join(f"{layer}:{keep!r}" for layer, keep in value.items())
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse_prune(entries: str, text: str) -> dict[int, int | float]:
    prune: dict[int, int | float] = {}
    for entry in entries.split("+"):
        layer, _, keep = (piece.strip() for piece in entry.partition(":"))
        if _parse_layer(layer, text) in prune:
            raise _grammar_error(f"prune layer {layer} given twice", text)
        if re.fullmatch(r"[0-9]+", keep):
            prune[int(layer)] = int(keep)
        elif re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE]-?[0-9]+)?", keep):
            prune[int(layer)] = float(keep)
        else:
            raise _grammar_error(entry.strip(), text)
    return prune


def _parse_layer(value: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]+", value):
        raise _grammar_error(value, text)
    return int(value)


def _parse_number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise _grammar_error(value, text) from None


def _parse_average(value: str, text: str) -> int | float:
    return int(value) if re.fullmatch(r"[0-9]+", value) else _parse_number(value, text)


def _grammar_error(what: str, text: str) -> ScheduleError:
    return ScheduleError(f"cannot read {what!r} in the schedule {text!r}: {GRAMMAR}")


def _json_layer(layer: str) -> int:
    if not re.fullmatch(r"[0-9]+", layer):
        raise ScheduleError(
            f'prune layer {layer!r} is not a number: write {{"prune": {{"10": 215}}}}'
        )
    return int(layer)


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ScheduleError(f"key {twice!r} is given twice in the schedule: keep one of them")
    return result
