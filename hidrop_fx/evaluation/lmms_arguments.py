"""Read the --model_args of lmms-eval, whose commas also stand in schedules.

pretrained=llava,schedule=hidrop-64,batch_size=8
schedule=visionzip(dominant=54,contextual=10),backend=eager
schedule=inject=8;prune=10:215+14:10;exit=24
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hidrop_fx.errors import HidropError
from hidrop_fx.methods.call_text import split_outside_brackets
from hidrop_fx.schedule.schedule import Schedule

_FIELDS = frozenset(field for field in Schedule.__dataclass_fields__ if not field.startswith("_"))


def read_model_args(
    given: str | Mapping[str, Any], constructor: Callable[..., Any]
) -> dict[str, Any]:
    """Return the arguments of a model class, by name.

    Commas within brackets belong to a value. In a schedule a semicolon stands for a comma, and a comma is right within
    brackets or quotes alone.

    Args:
        given: the text; or arguments that a program passes.
        constructor: whose keyword arguments are the names that there are.

    Raises:
        HidropError: a part is not name=value, a name is unknown or given twice.
    """
    if isinstance(given, Mapping):
        pairs = [(str(name), value) for name, value in given.items()]
    else:
        pairs = [_pair(part) for part in _parts(given)]
    known = [name for name in inspect.signature(constructor).parameters if name != "self"]
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise HidropError(f"model_args: {name} is given twice")
        if name in known:
            found[name] = value
            continue
        if name in _FIELDS:
            raise HidropError(
                f"model_args: {name}={value} is a field of a schedule, behind a comma that ends the schedule: write "
                f"semicolons in it, as in schedule=inject=8;prune=10:215+14:10;exit=24"
            )
        raise HidropError(f"model_args: there is no {name!r}; the names are {', '.join(known)}")
    if isinstance(found.get("schedule"), str):
        found["schedule"] = _schedule(found["schedule"])
    return found


def _pair(part: str) -> tuple[str, str]:
    name, equals, value = (piece.strip() for piece in part.partition("="))
    if not equals or not value:
        raise HidropError(
            f"model_args: {part.strip()!r} is not name=value. Commas separate arguments; in a schedule write semicolons, as in "
            "schedule=visionzip(dominant=54;contextual=10)"
        )
    return name, _unquoted(value)


def _parts(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes."""
    hidden: list[str] = []
    quote = ""
    for character in text:
        if character in "\"'" and quote in ("", character):
            quote = "" if quote else character
        hidden.append("\0" if quote and character in ",()[]{}" else character)
    plain = "".join(hidden).replace("{", "(").replace("}", ")")
    parts, start = [], 0
    for piece in split_outside_brackets(plain):
        parts.append(text[start : start + len(piece)])
        start += len(piece) + 1
    return [part for part in parts if part.strip()]


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


def _schedule(text: str) -> str:
    text = text.replace(";", ",")
    if text.count("(") != text.count(")"):
        raise HidropError(
            f"model_args: the brackets of schedule={text} do not close; write it as in "
            "schedule=visionzip(dominant=54;contextual=10)"
        )
    return text
