"""Put a runtime into a model, and take it out again: instance attributes only.

    model.forward, model.model.forward, model._prepare_cache_for_generation
    model.save_pretrained, model.train

Nothing else of the model changes: parameters, state dict and class stay as they are. Hooks on the model,
its vision tower, projector and head run as before; hooks inside the text decoder do not, since its
layers are not called one by one.
"""

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from hidrop_fx.errors import HidropError
from hidrop_fx.planning import plan
from hidrop_fx.runtime.hf.forward import BaseForward, Forward, NoteLabels
from hidrop_fx.runtime.hf.generate import KeepPixels, PrepareCache
from hidrop_fx.runtime.hf.override import Override
from hidrop_fx.runtime.hf.saving import SavePretrained
from hidrop_fx.runtime.hf.tower import tower_overrides
from hidrop_fx.runtime.runtime import RATIOS, Runtime
from hidrop_fx.training.ratios import Ratios

_ATTRIBUTE = "_hidrop_runtime"
_ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"


def bind(model: Any, runtime: Runtime, wrapper: Any = None, ratios: Ratios | None = None) -> None:
    """Let `runtime` run in place of the model's forward.

    Args:
        wrapper: PEFT's model around this one, if there is: it saves itself.
        ratios: learned under this schedule before; None begins with its own counts.
    """
    overrides: list[Override] = [
        Forward(model, "forward", runtime),
        BaseForward(model.model, "forward", runtime),
        PrepareCache(model, "_prepare_cache_for_generation", runtime),
        SavePretrained(model, "save_pretrained", runtime),
        Train(model, "train", runtime),
    ]
    if hasattr(model, _ENCODES):  # where transformers has no such step, forward gets pixels
        overrides.append(KeepPixels(model, _ENCODES, runtime))
    overrides += tower_overrides(runtime)
    if wrapper is not None and wrapper is not model:
        overrides.append(SavePretrained(wrapper, "save_pretrained", runtime))
    if runtime.schedule.learns:
        found = Ratios(plan(runtime.schedule, model)).to(model.device) if ratios is None else ratios
        setattr(model, RATIOS, found)
    for override in overrides:
        override.install()
    model.__dict__[_ATTRIBUTE] = (runtime, overrides)


def unbind(model: Any) -> None:
    """Give the model its own forward back."""
    runtime, overrides = model.__dict__[_ATTRIBUTE]
    while isinstance(overrides[-1], NoteLabels):
        overrides.pop().remove()
    lost = [override.name for override in overrides if not override.in_force]
    if lost:
        raise HidropError(
            f"{', '.join(lost)} of this model was replaced after hidrop.compile; take that wrapper off "
            "first, so that it is not lost"
        )
    del model.__dict__[_ATTRIBUTE]
    for override in reversed(overrides):
        override.remove()
    if hasattr(model, RATIOS):
        delattr(model, RATIOS)
    if runtime.graphs is not None:
        runtime.graphs.release()


def runtime_of(model: Any) -> Runtime | None:
    """Return the runtime of a compiled model, None for any other."""
    found = getattr(unwrapped(model), "__dict__", {}).get(_ATTRIBUTE)
    return None if found is None else found[0]


def require_runtime(model: Any, consequence: str) -> Runtime:
    """Return the runtime of a compiled model.

    Args:
        consequence: what follows from it, or what to do, for the message.

    Raises:
        HidropError: the model is not compiled.
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise HidropError(f"this {type(model).__name__} is not compiled; {consequence}")
    return runtime


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside PEFT's, DDP's and torch.compile's wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


class Train(Override):
    """`model.train`, which trainers call before a step: time to see whether forward was replaced."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.original(*args, **kwargs)
        ours = (Forward, NoteLabels)
        if not isinstance(self.owner.__dict__.get("forward"), ours):
            _, overrides = self.owner.__dict__[_ATTRIBUTE]
            wrapper = NoteLabels(self.owner, "forward", self.runtime)
            wrapper.install()
            overrides.append(wrapper)
        return found
