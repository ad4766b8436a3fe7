"""A name with arguments as text: "fastv(layer=2,keep=0.5)"."""

import ast
import re
from collections.abc import Mapping
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
            f'cannot read {arguments!r} in {text!r}: write arguments as in "{name}(layer=2,keep=0.5)"'
        ) from None
    return name, values


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Write the form that `parse_call` reads."""
    return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})".replace(
        ", ", ","
    )


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
