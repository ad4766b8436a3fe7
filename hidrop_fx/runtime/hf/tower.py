"""The vision tower of a model that runs on a side stream, compiled: its equal layers share what is compiled.

transformers' hooks around a layer's attention break its graph in up to three pieces.
"""

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture.layers import base_of
from hidrop_fx.lowering.compilers import COMPILER_ERRORS, logged_compiler
from hidrop_fx.runtime.capture_store import CaptureStore
from hidrop_fx.runtime.hf.copies import LEFT_OUT
from hidrop_fx.runtime.hf.override import Record, call_replaced, override, record_of, replaced
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.surroundings import in_dispatch_mode

logger = logging.getLogger("hidrop_fx")

_NAME = "vision layer"


class _Shared:
    """What the layers of one tower share: a compiler, and what it has compiled for."""

    def __init__(self, store: CaptureStore) -> None:
        self.compiler = logged_compiler("inductor", _NAME, _shape, store.log)
        self.variants: set[Hashable] = set()
        self.failed = False


_SHARED: "weakref.WeakKeyDictionary[CaptureStore, _Shared]" = weakref.WeakKeyDictionary()


def tower_layer(layer: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Run one layer of the tower: compiled for any number of images, where no gradients are wanted.

    Raises:
        InputError: it would compile, and the policy for new shapes is "error".
    """
    record = record_of(layer)
    assert record is not None
    if torch.is_grad_enabled() or not _may_compile(runtime, (*args, *kwargs.values())):
        return call_replaced(layer, "forward", *args, **kwargs)
    try:
        return _compiled(layer, record, runtime)(*args, **kwargs)
    except COMPILER_ERRORS as error:
        _SHARED[runtime.programs.store].failed = True
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip().splitlines() or ["no message"])[0]
        message = f"{_NAME} runs uncompiled: {type(error).__name__}: {reason}"
        logger.warning(message)
        runtime.programs.log.fallbacks.append(message)
        return call_replaced(layer, "forward", *args, **kwargs)


def _may_compile(runtime: Runtime, given: Sequence[Any]) -> bool:
    store = runtime.programs.store
    if store not in _SHARED:
        _SHARED[store] = _Shared(store)
    shared = _SHARED[store]
    if shared.failed:
        return False
    if in_dispatch_mode():
        runtime.programs.log.note_dispatch_mode()
        return False
    states = _states(given)
    if states is None:
        return False  # packed patches, which are of another length in every call
    device = states.device
    # All sizes are dynamic, but a size of 1 is specialised.
    sizes = tuple(size == 1 for size in states.shape)
    variant = (sizes, states.dtype, device, torch.is_autocast_enabled(device.type))
    if variant in shared.variants:
        return True
    shown = "1" if sizes[0] else "*"
    if not runtime.programs.shape_policy.admit(f"a variant of the {_NAME} for {shown} images"):
        return False
    shared.variants.add(variant)
    return True


def _compiled(layer: Any, record: Record, runtime: Runtime) -> Callable[..., Any]:
    if record.compiled is None:
        cls: Any = type(layer)
        original = replaced(layer, "forward") or MethodType(cls.forward, layer)
        compiler = _SHARED[runtime.programs.store].compiler
        record.compiled = torch.compile(original, backend=compiler, dynamic=True)
    return record.compiled


def override_tower(runtime: Runtime) -> None:
    """Override the layers of the tower, if there is a side stream and a compiler.

    Copies of a layer have no override: that of a tower would drag the whole model along. A copied model
    does so when it makes its first program.
    """
    record = record_of(runtime.model)
    if record is None or record.tower:
        return
    tower = getattr(base_of(runtime.model), "vision_tower", None)
    if tower is None or runtime.options.backend != "inductor" or not runtime.overlaps_vision:
        return
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for layer in max(stacks, key=len, default=()) if record_of(layer) is None]
    for layer in layers:
        override(layer, record.schedules, {"forward": tower_layer, **LEFT_OUT})
    record.tower = layers


def _states(given: Sequence[Any]) -> Tensor | None:
    """Return the states [images, tokens, width] among a layer's arguments; None if there are none."""
    return next((value for value in given if isinstance(value, Tensor) and value.dim() == 3), None)


def _shape(given: Sequence[Any]) -> str:
    states = _states(given)
    return "" if states is None else str(list(states.shape))
