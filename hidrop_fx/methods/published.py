"""Published methods by name: what a schedule must say to do what a paper's code does.

    @register_method("v2drop", source="...", summary="...")
    def v2drop(*, layers=(3, 17, 22), keeps=(0.5, 0.25, 1)):
        return {"prune": dict(zip(layers, keeps)), "score": "state_change"}      # fields of a `Schedule`

    Schedule.preset("v2drop", layers=(2, 4, 6))
    Schedule.parse("v2drop(layers=(2,4,6))")

Layers are 0-based inputs, as everywhere; each function's defaults are its authors' own.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods.registry import Registry

Fields = dict[str, Any]
"""Arguments of a `Schedule`."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published method, as a function from its own parameters to the fields of a schedule."""

    name: str
    fields: Callable[..., Fields]
    source: str
    """Paper and code."""
    summary: str
    """One line on the rule."""
    trains: bool
    """Its authors train with it."""

    @cached_property
    def signature(self) -> inspect.Signature:
        """Parameters with the authors' own values as defaults; all by keyword."""
        return inspect.signature(self.fields)

    def __call__(self, **arguments: Any) -> Fields:
        """Return the fields of the schedule; numpy's scalars count as the numbers that they are.

        Raises:
            ScheduleError: an argument is unknown or missing.
        """
        try:
            self.signature.bind(**arguments)
        except TypeError as error:
            raise ScheduleError(f"{error} for method {self.name!r}; write {self}") from None
        return self.fields(**{name: _plain(value) for name, value in arguments.items()})

    def __str__(self) -> str:
        given = self.signature.parameters.values()
        shown = ", ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in given
        )
        return f"{self.name}({shown})"


METHODS: Registry[Method] = Registry("method", default="fastv")


def register_method(
    name: str, *, source: str, summary: str, trains: bool = False
) -> Callable[[Callable[..., Fields]], Callable[..., Fields]]:
    """Register the decorated function under a name that schedules may be made by.

    Raises:
        ScheduleError: the name is taken.
    """

    def register(fields: Callable[..., Fields]) -> Callable[..., Fields]:
        METHODS.add(
            name, Method(name=name, fields=fields, source=source, summary=summary, trains=trains)
        )
        return fields

    return register


def pairs(layers: Sequence[int], keeps: Sequence[int | float]) -> dict[int, int | float]:
    """Return filter layer -> keep.

    Raises:
        ScheduleError: the two do not have the same length or are empty, or a layer is no number or comes twice.
    """
    for name, values in (("layers", layers), ("keeps", keeps)):
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise ScheduleError(
                f"{name}={values!r} is no list; write one entry for each filter layer"
            )
    for layer in layers:
        if not isinstance(layer, numbers.Integral):
            raise ScheduleError(
                f"filter layer {layer!r} is a {type(layer).__name__}: use an integer >= 0"
            )
    if len(layers) != len(keeps):
        raise ScheduleError(
            f"layers={tuple(layers)!r} are {len(layers)} and keeps={tuple(keeps)!r} are {len(keeps)}: give "
            "one keep for each layer"
        )
    if not layers:
        raise ScheduleError(f"layers={layers!r} names no filter layer: name one")
    if len(set(layers)) < len(layers):
        raise ScheduleError(f"layers={tuple(layers)!r} names a layer twice")
    return dict(zip(layers, keeps, strict=True))


def required(**values: Any) -> None:
    """Check that no argument is None, where a schedule's field of None would leave the method out.

    Raises:
        ScheduleError: one is None.
    """
    for name, value in values.items():
        if value is None:
            raise ScheduleError(
                f"{name}=None would do nothing at all: give a value, or leave {name} out for the authors' own"
            )


def _plain(value: Any) -> Any:
    """Return a number or text, alone or in a list, as Python's own type, whose text can be read again."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return float(str(value))  # through str, so that numpy's float32 0.1 becomes 0.1
    if type(value) in (list, tuple):
        return type(value)(_plain(each) for each in value)
    return value
