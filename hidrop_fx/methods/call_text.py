"""A name with arguments as text: "fastv(layer=2,keep=0.5)"."""

import ast
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hidrop_fx.errors import ScheduleError

_CALL = re.compile(r"([A-Za-z][\w-]*)\s*\((.*)\)", re.DOTALL)


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Read name and arguments; None for a text of another form.

    Raises:
        ScheduleError: the arguments are not `name=value` with plain values.
    """
    found = _CALL.fullmatch(text.strip())
    if found is None:
        return None
    name, arguments = found.groups()
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        values = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
        if call.args or len(values) < len(call.keywords):
            raise ValueError
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ScheduleError(
            f"cannot read {arguments!r} in {text!r}: write arguments by name, as plain values, texts in quotes, as in "
            '"fastv(layer=2,keep=0.5)"'
        ) from None
    return name, values


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Write the form that `parse_call` reads."""
    return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})".replace(
        ", ", ","
    )


@lru_cache(maxsize=256)
def name_in(text: str) -> str:
    """Return the name in front of the arguments; the text itself where it has none."""
    call = parse_call(text)
    return text if call is None else call[0]


def checked_arguments(
    field: str, text: str, name: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all arguments of a rule, those that a text gives and the defaults of the others.

    Args:
        field: of the schedule, for an error.

    Raises:
        ScheduleError: the rule does not take one that is given.
    """
    call = parse_call(text)
    given = {} if call is None else call[1]
    unknown = [key for key in given if key not in defaults]
    if unknown:
        raise ScheduleError(
            f"{field}={text!r}: {name} takes {', '.join(defaults) or 'no arguments'}, not "
            f"{', '.join(unknown)}"
        )
    return {**defaults, **given}


def split_outside_brackets(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
