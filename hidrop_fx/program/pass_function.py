"""Passes as the program and the pipeline see them: functions with a name, and what disables one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hidrop_fx.program.history import PassResult

Pass = Callable[..., PassResult]
"""A rewrite of a program, `pass_fn(program, plan, **options)`: plans first, mutates second, raises
rather than skip."""
_Fn = TypeVar("_Fn", bound=Pass)


@dataclass(frozen=True, kw_only=True)
class Substitute:
    """The way to the same numbers without a pass."""

    description: str
    """Completes "disabled: ...", e.g. "prefill writes no KV buffers"."""
    options: Mapping[str, Any] | None
    """Options under which the pass runs then; None to leave it out."""


def pass_name(pass_fn: Pass) -> str:
    """Return the name of a pass; that of the function inside for a `functools.partial`."""
    name = getattr(pass_fn, "__name__", None) or getattr(
        getattr(pass_fn, "func", None), "__name__", None
    )
    return name if isinstance(name, str) else ""


def can_be_disabled(
    description: str, options: Mapping[str, Any] | None = None
) -> Callable[[_Fn], _Fn]:
    """Mark a pass that changes how, and not what, is computed.

    Args:
        description: what is done instead where the pass is disabled.
        options: the pass runs with these then; None leaves it out.
    """

    def mark(pass_fn: _Fn) -> _Fn:
        pass_fn.substitute = Substitute(description=description, options=options)  # type: ignore[attr-defined]
        return pass_fn

    return mark


def substitute_of(pass_fn: Pass) -> Substitute | None:
    """Return what runs where the pass is disabled; None where it cannot be."""
    found: Substitute | None = getattr(pass_fn, "substitute", None)
    return found
