"""Put the runtimes of its schedules into a model, and take it out again: instance attributes only.

    model.forward, model.model.forward, model._call_impl (what `model(...)` runs)
    model.generate, model._prepare_cache_for_generation, model.save_pretrained
    model.__reduce_ex__ (copies and pickles)

Nothing else of the model changes: parameters, state dict and class stay as they are. Hooks on the model,
its vision tower, projector and head run as before; hooks inside the text decoder do not, since its
layers are not called one by one.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hidrop_fx.capture.layers import base_of, text_decoder
from hidrop_fx.capture.placement import home
from hidrop_fx.errors import HidropError
from hidrop_fx.planning import plan
from hidrop_fx.planning.geometry import MODULES
from hidrop_fx.runtime.given_modules import GivenModules
from hidrop_fx.runtime.hf.copies import COPIED
from hidrop_fx.runtime.hf.forward import base_forward, forward
from hidrop_fx.runtime.hf.generate import (
    CACHE,
    COPIES,
    PIXELS,
    generate,
    keep_pixels,
    keep_together,
    prepare_cache,
)
from hidrop_fx.runtime.hf.override import RECORD, override, record_of, take_back
from hidrop_fx.runtime.hf.replaced import call
from hidrop_fx.runtime.hf.saving import save_pretrained
from hidrop_fx.runtime.hf.tower import override_tower
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.runtime.schedule_set import ScheduleSet
from hidrop_fx.training.ratios import Ratios

_OVERRIDES = {
    "forward": forward,
    "_call_impl": call,
    "generate": generate,
    CACHE: prepare_cache,
    COPIES: keep_together,
    PIXELS: keep_pixels,  # where transformers has no such step, forward gets pixels
    "save_pretrained": save_pretrained,
    **COPIED,
}


def bind(
    model: Any,
    schedules: ScheduleSet,
    wrapper: Any = None,
    ratios: Mapping[str, Ratios | None] = MappingProxyType({}),
    modules: Mapping[str, nn.Module] = MappingProxyType({}),
) -> None:
    """Let the runtimes of schedules run in place of the model's forward.

    Args:
        wrapper: PEFT's model around this one, if there is: it saves itself.
        ratios: learned under schedules of these names before; others begin with their own counts.
        modules: beside the model's own, that schedules read.
    """
    if modules:
        setattr(model, MODULES, GivenModules(modules))
    for name, runtime in schedules.named.items():
        if runtime.schedule.learns:
            found = ratios.get(name)
            if found is None:
                found = Ratios(plan(runtime.schedule, model)).to(home(text_decoder(model)))
            setattr(model, runtime.ratios_at, found)
    there = {name: body for name, body in _OVERRIDES.items() if hasattr(type(model), name)}
    record = override(model, schedules, there)
    record.base = base_of(model)
    if record.base is not model:
        override(record.base, schedules, {"forward": base_forward, **COPIED})
    if wrapper is not model and hasattr(type(wrapper), "save_pretrained"):
        override(wrapper, schedules, {"save_pretrained": save_pretrained, **COPIED})
        record.wrapper = weakref.ref(wrapper)
    for runtime in schedules.named.values():
        override_tower(runtime)
        if override_tower not in runtime.on_program:
            runtime.on_program.append(override_tower)


def unbind(model: Any, wrapper: Any = None) -> None:
    """Give the model its own methods back; what another library put around one stays where it is.

    Args:
        wrapper: PEFT's model around this one, if it is at hand.
    """
    record = record_of(model)
    assert record is not None
    around = None if record.wrapper is None else record.wrapper()
    for owner in (model, record.base, *record.tower, around, wrapper):
        if owner is not None:
            take_back(owner)
    for runtime in record.schedules.named.values():
        if hasattr(model, runtime.ratios_at) and record_of(base_of(model)) is None:
            delattr(model, runtime.ratios_at)  # a shallow copy leaves them to the original
    if hasattr(model, MODULES) and record_of(base_of(model)) is None:
        delattr(model, MODULES)
    graphs = record.schedules.default.graphs
    if graphs is not None:
        graphs.release()


@contextmanager
def suspended(model: Any) -> Iterator[None]:
    """Let a compiled model run as transformers ships it."""
    parts = dict.fromkeys((model, base_of(model)))
    bound = [each for each in parts if record_of(each) is not None]
    records = [each.__dict__.pop(RECORD) for each in bound]
    try:
        yield
    finally:
        for each, record in zip(bound, records, strict=True):
            each.__dict__[RECORD] = record


def check_owner(model: Any) -> None:
    """Check that the model without its head does not belong to another compiled model.

    Raises:
        HidropError: it does.
    """
    record = record_of(base_of(model))
    if record is not None and record.runtime.model is not model:
        raise HidropError(
            f"the decoder of this {type(model).__name__} is that of another compiled model (a shallow copy "
            f"shares it), compiled under {record.runtime.schedule}; call hidrop.restore on that one first, "
            "or compile a copy.deepcopy"
        )


def schedules_of(model: Any) -> ScheduleSet | None:
    """Return the schedules of a compiled model, None for any other."""
    record = record_of(unwrapped(model))
    return None if record is None else record.schedules


def runtime_of(model: Any) -> Runtime | None:
    """Return the runtime of a compiled model under the schedule in use, None for any other model."""
    found = schedules_of(model)
    return None if found is None else found.current


def require_runtime(model: Any, consequence: str) -> Runtime:
    """Return the runtime of a compiled model under the schedule in use.

    Args:
        consequence: what follows from it, or what to do, for the message.

    Raises:
        HidropError: the model is not compiled.
    """
    return require_schedules(model, consequence).current


def require_schedules(model: Any, consequence: str) -> ScheduleSet:
    """Return the schedules of a compiled model; as `require_runtime`."""
    found = schedules_of(model)
    if found is None:
        raise HidropError(f"this {type(model).__name__} is not compiled; {consequence}")
    return found


def _is_engine(model: Any) -> bool:
    """Return True for what `deepspeed.initialize` returns."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside PEFT's, DDP's, DeepSpeed's and torch.compile's wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel) or _is_engine(model):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model
