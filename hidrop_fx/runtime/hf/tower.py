"""The vision tower of a model that runs on a side stream, compiled: its equal layers share what is compiled.

transformers' hooks around a layer's attention break its graph in up to three pieces.
"""

import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from hidrop_fx.lowering.compilers import logged_compiler
from hidrop_fx.runtime.hf.copies import LEFT_OUT
from hidrop_fx.runtime.hf.override import call_replaced, override, record_of, replaced
from hidrop_fx.runtime.runtime import Runtime

_NAME = "vision layer"

# One for each runtime, so that layers of a class share what it makes.
_COMPILERS: "weakref.WeakKeyDictionary[Runtime, Callable[..., Any]]" = weakref.WeakKeyDictionary()


def tower_layer(layer: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Run one layer of the tower, compiled where no gradients are wanted."""
    if torch.is_grad_enabled():
        return call_replaced(layer, "forward", *args, **kwargs)
    record = record_of(layer)
    assert record is not None
    if record.compiled is None:
        if runtime not in _COMPILERS:
            _COMPILERS[runtime] = logged_compiler("inductor", _NAME, _shape, runtime.programs.log)
        cls: Any = type(layer)
        original = replaced(layer, "forward") or MethodType(cls.forward, layer)
        record.compiled = torch.compile(original, backend=_COMPILERS[runtime])
    return record.compiled(*args, **kwargs)


def override_tower(runtime: Runtime) -> None:
    """Override the layers of the tower, if there is a side stream and a compiler.

    Copies of a layer have no override: that of a tower would drag the whole model along. A copied model
    does so when it makes its first program.
    """
    record = record_of(runtime.model)
    if record is None or record.tower:
        return
    tower = getattr(runtime.model.model, "vision_tower", None)
    if tower is None or runtime.options.backend != "inductor" or not runtime.overlaps_vision:
        return
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for layer in max(stacks, key=len, default=()) if record_of(layer) is None]
    for layer in layers:
        override(layer, runtime, {"forward": tower_layer, **LEFT_OUT})
    record.tower = layers


def _shape(inputs: Sequence[Any]) -> str:
    """Return the shape of the states [images, tokens, width]."""
    states = next(v for v in inputs if isinstance(v, torch.Tensor) and v.dim() == 3)
    return str(list(states.shape))
