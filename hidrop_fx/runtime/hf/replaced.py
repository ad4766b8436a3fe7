"""Forwards that other libraries put in the place of a compiled model's, found when the model is called.

    model.forward = fused_head            # TRL, Liger: calls model.model, and keeps the labels to itself
    model(**inputs, labels=labels)        # runs `call`, whichever forward there is; it notes the labels
      fused_head(...)
        model.model(**inputs)             # `base_forward` asks for the labels of the call that it is in

The scores of a schedule need the labels. A forward that calls ours, as accelerate's in mixed precision, has
handed them on.
"""

import functools
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor

from hidrop_fx.capture.layers import base_of
from hidrop_fx.capture.placement import moves_inputs
from hidrop_fx.errors import HidropError
from hidrop_fx.runtime.hf.dual_step import taught, waiting_for_lessons
from hidrop_fx.runtime.hf.override import (
    install,
    is_override,
    is_wrapped,
    override,
    record_of,
    signature_of,
    take_back,
)
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.training.loss import supervision

_NOTED: ContextVar[tuple[Any, Tensor | None]] = ContextVar("noted labels", default=(None, None))


def call(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Do what `model(...)` does, and note its labels where another library's forward runs."""
    _check_base(model, runtime)
    found = model.__dict__.get("forward")
    if is_override(found):
        return type(model)._call_impl(model, *args, **kwargs)
    if found is None or _is_own(model, found):
        runtime.log_once(
            "model.forward was set back to its class's own after hidrop.compile: the compiled one is put "
            "in its place again; hidrop.restore(model) takes it out",
            logging.WARNING,
        )
        install(model, "forward")
        return type(model)._call_impl(model, *args, **kwargs)
    token = _NOTED.set((model, _labels(model, args, kwargs)))
    try:
        with waiting_for_lessons() as lessons:
            return taught(type(model)._call_impl(model, *args, **kwargs), lessons)
    finally:
        _NOTED.reset(token)


def labels_of_caller(model: Any, runtime: Runtime) -> Tensor | None:
    """Return the labels of another library's forward that runs now, None if none does, or it has none.

    Raises:
        HidropError: it was called past the model, and its labels cannot be told.
    """
    owner, labels = _NOTED.get()
    if owner is not model:
        labels = _labels_on_stack(model, runtime)
    if labels is not None and model.training and runtime.ratios is not None:
        runtime.log_once(
            "another library's forward computes the loss: the budget term of selection='dtopk' is "
            "not part of it; add model.hidrop_ratios.penalty() to hold the number of tokens"
        )
    return labels


def _check_base(model: Any, runtime: Runtime) -> None:
    """Notice that the model without its head, or its forward, was replaced."""
    record, base = record_of(model), base_of(model)
    if record is None or base is model:
        return
    if base is not record.base and type(base) is type(record.base):
        before = record_of(record.base)
        if before is not None:
            take_back(record.base)
            override(base, before.schedules, before.bodies)
        record.base = base
    found = base.__dict__.get("forward")
    if is_override(found):
        return
    if found is None or _is_own(base, found):
        if type(base) is type(record.base):  # not a wrapper around it
            install(base, "forward")
        return
    runtime.log_once(
        f"model.model.forward was replaced after hidrop.compile by {_named(found)}: it does not run in "
        "model(...), whose compiled forward calls the programs; hooks on the model do",
        logging.WARNING,
    )


def foreign_forward(model: Any) -> str | None:
    """Return the name of another library's forward, of the object or of its class; None if there is none.

    A forward that wraps an override, left there by `restore`, is none.
    """
    found = model.__dict__.get("forward")
    if found is not None:
        if is_override(found) or is_wrapped(model, "forward") or _is_own(model, found):
            return None
        if moves_inputs(model):  # as the compiled one does in its place
            return None
        return _named(found)
    cls: Any = type(model)
    found = cls.forward
    package = found.__module__.partition(".")[0]
    owner = next(each for each in cls.__mro__ if "forward" in vars(each))
    return (
        None if package in ("transformers", owner.__module__.partition(".")[0]) else _named(found)
    )


def _named(attribute: Any) -> str:
    """Return the name of a function or method and of its module, for messages."""
    inner = _function_in(attribute)
    # `functools.wraps` gives a wrapper the names of what it wraps; the code has its own.
    code = getattr(inner, "__code__", None)
    module = getattr(inner, "__globals__", {}).get("__name__") or type(inner).__module__
    name = type(inner).__qualname__ if code is None else code.co_qualname
    return f"{module}.{name}"


def _function_in(attribute: Any) -> Any:
    """Return what a bound method or partial calls."""
    while True:
        if isinstance(attribute, functools.partial):
            attribute = attribute.func
        elif type(attribute) is MethodType:
            attribute = attribute.__func__
        else:
            return attribute


def _is_own(model: Any, found: Any) -> bool:
    """Return True for the method of its class."""
    own: Any = type(model)
    return type(found) is MethodType and found.__self__ is model and found.__func__ is own.forward


def _labels(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the labels among the arguments of a call."""
    if args:
        _, *names = signature_of(type(model).forward).parameters
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    labels = kwargs.get("labels")
    return supervision(kwargs.get("shift_labels") if labels is None else labels, kwargs)


def _labels_on_stack(model: Any, runtime: Runtime) -> Tensor | None:
    """Return the labels of another library's forward that was called as `model.forward(...)`."""
    forward = model.__dict__.get("forward")
    if is_override(forward) or record_of(model) is None:
        return None
    codes = set(_codes(forward))
    frame = sys._getframe(2)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return None  # model.model was called directly
    code, values = frame.f_code, frame.f_locals
    if "labels" not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        raise HidropError(
            f"model.forward was replaced after hidrop.compile by {_named(forward)}, which was called "
            "past the model, so that its labels are not known, and the schedule scores by them; call "
            "model(...) in place of model.forward(...)"
        )
    runtime.log_once(
        f"model.forward was replaced by {_named(forward)} and called past the model; its labels are "
        "read from its arguments"
    )
    given = {name: values.get(name) for name in ("labels", "shift_labels")}
    return _labels(model, (), given)


def _codes(attribute: Any) -> Iterator[CodeType]:
    """Yield the code of a callable, and of what it wraps, overrides left out."""
    for _ in range(20):
        attribute = _function_in(attribute)
        if attribute is None or is_override(attribute):
            return
        function = attribute if type(attribute) is FunctionType else type(attribute).__call__
        if hasattr(function, "__code__"):
            yield function.__code__
        attribute = getattr(attribute, "__wrapped__", None)
