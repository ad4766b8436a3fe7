"""Bound methods of one object in place of its class's: instance attributes, taken out again without a trace.

    override(model, schedules, {"forward": forward})  # a module's function: forward(model, runtime, *args, **kwargs)
    model.forward                                     # a bound method with transformers' signature
    take_back(model)

A method looks the schedules up on the object that it is bound to, at the call, and runs under the one that is in
use, or that the argument `hidrop_schedule` names. So a copy, whose methods are
bound to the copy, runs its own weights under its own schedule; and a wrapper that another library put around
a method keeps working when the override is taken back: the method then is the one that it stood in for.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch

from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.runtime.schedule_set import ARGUMENT, ScheduleSet

Body = Callable[..., Any]
"""A module's function that takes the object, its runtime, and the arguments of the method."""

RECORD = "_hidrop_overrides"
"""Attribute of an object under which its overrides are found."""
_WRAPPED = "_hidrop_wrapped"


@dataclass(kw_only=True, eq=False)
class Record:
    """The overrides of one object."""

    owner: Any
    schedules: ScheduleSet
    bodies: dict[str, Body]
    """By the name of the method that each replaces."""
    previous: dict[str, Any]
    """Attributes that the object had under these names already, e.g. another library's."""
    base: Any = None
    """The model without its head, with overrides of its own."""
    tower: list[Any] = field(default_factory=list)
    """Layers of the vision tower with overrides of their own."""
    wrapper: "weakref.ref[Any] | None" = None
    """PEFT's model around this one, with an override of its own."""
    compiled: Callable[..., Any] | None = None
    """The original, compiled for this very object."""

    @property
    def runtime(self) -> Runtime:
        """The runtime of the schedule in use."""
        return self.schedules.current

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to no copy: another model's wrapper, layers whose copies have no override, code
        # compiled for other weights.
        return {**self.__dict__, "tower": [], "wrapper": None, "compiled": None}


@dataclass(frozen=True, kw_only=True)
class _Wrapped:
    """An attribute that another library put around an override, left where it is."""

    previous: Any
    """The attribute that the object had before the override."""


def override(owner: Any, schedules: ScheduleSet, bodies: Mapping[str, Body]) -> Record:
    """Put methods in place of an object's own.

    An attribute that was put around an earlier override stays around this one.
    """
    wrapped: dict[str, _Wrapped] = owner.__dict__.pop(_WRAPPED, {})
    previous: dict[str, Any] = {}
    for name in bodies:
        found = owner.__dict__.get(name)
        if found is None or is_override(found):
            continue
        previous[name] = wrapped[name].previous if name in wrapped else found
    record = Record(owner=owner, schedules=schedules, bodies=dict(bodies), previous=previous)
    owner.__dict__[RECORD] = record
    for name in bodies:
        if name not in wrapped or name not in previous:
            install(owner, name)
    return record


def install(owner: Any, name: str) -> None:
    """Put the method of that name in place, whatever is there."""
    body = owner.__dict__[RECORD].bodies[name]
    owner.__dict__[name] = MethodType(_function(body, name, getattr(type(owner), name)), owner)


def take_back(owner: Any) -> None:
    """Give an object its own methods back; what another library put around one stays where it is."""
    record: Record | None = owner.__dict__.pop(RECORD, None)
    if record is None:
        return
    wrapped: dict[str, _Wrapped] = {}
    for name in record.bodies:
        found, previous = owner.__dict__.get(name), record.previous.get(name)
        if found is None:
            continue
        if not is_override(found):
            wrapped[name] = _Wrapped(previous=previous)
            continue
        del owner.__dict__[name]
        # A method that is not wrapped was unwrapped, and with it what was there before.
        if previous is not None and hasattr(found, "__wrapped__"):
            owner.__dict__[name] = previous
    if wrapped:
        owner.__dict__[_WRAPPED] = wrapped


def record_of(owner: Any) -> Record | None:
    """Return the overrides of an object, None if there are none."""
    found: Record | None = getattr(owner, "__dict__", {}).get(RECORD)
    return found


def is_override(attribute: Any) -> bool:
    """Return True for a method that `override` made, and for one that was unwrapped or bound twice."""
    while type(attribute) is MethodType:
        attribute = attribute.__func__
    return type(attribute) is FunctionType and attribute.__code__ is _CODE


def is_wrapped(owner: Any, name: str) -> bool:
    """Return True if what `take_back` left under this name is there around an override that is gone."""
    return name in owner.__dict__.get(_WRAPPED, {})


def replaced(owner: Any, name: str) -> Any:
    """Return the attribute in whose place an override is, or was; None for the class's own method."""
    record = record_of(owner)
    if record is not None:
        return record.previous.get(name)
    wrapped = owner.__dict__.get(_WRAPPED, {}).get(name)
    return None if wrapped is None else wrapped.previous


def call_replaced(owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the method in whose place an override is, or was."""
    found = replaced(owner, name)
    if found is None:
        # Not as a bound method, which torch.compile would look up on the object, and find its own caller.
        return getattr(type(owner), name)(owner, *args, **kwargs)
    return found(*args, **kwargs)


def arguments(
    method: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return positional and keyword arguments of a class's method by name."""
    if not args:
        return kwargs
    bound = signature_of(method).bind(owner, *args, **kwargs).arguments
    bound.pop(next(iter(bound)))
    extra = bound.pop("kwargs", {})
    return {**bound, **extra}


def signature_of(method: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a class's method, `self` included."""
    if (
        method not in _SIGNATURES
    ):  # torch.compile looks into a dictionary, but not into an lru_cache
        _SIGNATURES[method] = inspect.signature(method)
    return _SIGNATURES[method]


_SIGNATURES: dict[Callable[..., Any], inspect.Signature] = {}


def _method(body: Body, name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is None:
            return call_replaced(self, name, *args, **kwargs)
        if torch.compiler.is_compiling():
            return _beside_the_compiler(body, self, record, args, kwargs)
        return _run(body, self, record, args, kwargs)

    return method


def _run(
    body: Body, owner: Any, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a method under the schedule that is in use, or that an argument asks for."""
    if kwargs.get(ARGUMENT) is None:
        kwargs.pop(ARGUMENT, None)
        return body(owner, record.runtime, *args, **kwargs)
    with record.schedules.used(kwargs.pop(ARGUMENT)):
        return body(owner, record.runtime, *args, **kwargs)


@torch.compiler.disable(
    reason="a model compiled by hidrop_fx runs programs that are compiled already"
)
def _beside_the_compiler(
    body: Body, owner: Any, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a method that `torch.compile`, put around the model, would trace: the tracing of programs and all.

    A guard on what the method reads, such as a dictionary with weak keys, need not hold even once.
    """
    return _run(body, owner, record, args, kwargs)


_CODE = _method(lambda *_: None, "").__code__


@functools.lru_cache(maxsize=256)
def _function(body: Body, name: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a method that looks like the class's own.

    accelerate unwraps a forward along `__wrapped__` to the end, and binds what it finds there to the
    model: the end must be this method itself, not the class's.
    """
    end = functools.update_wrapper(_method(body, name), like)
    del end.__wrapped__
    end.__signature__ = signature_of(like)  # type: ignore[attr-defined]
    method = functools.update_wrapper(_method(body, name), end)
    del method.__signature__  # type: ignore[attr-defined]  # wrappers would inherit it, `self` and all
    return method
