"""Hooks of accelerate on the model itself, whose forward a compiled one has replaced: what they did is done here.

    model = from_pretrained(..., device_map="auto")   # model.forward is accelerate's: moves arguments, calls the model's own
    hidrop.compile(model, ...)                        # model.forward is ours: moves arguments by the same hook

A model that is dispatched after `compile` has accelerate's forward around ours, which needs nothing of this.
"""

from collections.abc import Callable
from typing import Any

from hidrop_fx.capture.layers import base_of
from hidrop_fx.capture.placement import HOOK, moves_inputs, offloads
from hidrop_fx.runtime.hf.override import is_override

_BESIDE_ITS_FIELDS = ("logit_columns", "pass_outputs")
"""Attributes of an output, which are lost where accelerate makes it again on another device."""


def moving(owner: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Call a compiled forward between what the hook of a module does before and behind it."""
    hook = owner.__dict__.get(HOOK)
    if hook is None or not is_override(owner.__dict__.get("forward")) or not moves_inputs(owner):
        return forward(*args, **kwargs)
    args, kwargs = hook.pre_forward(owner, *args, **kwargs)
    try:
        output = forward(*args, **kwargs)
    except BaseException:
        hook.post_forward(owner, None)  # weights that it loaded
        raise
    moved = hook.post_forward(owner, output)
    for name in _BESIDE_ITS_FIELDS:
        if moved is not output and hasattr(output, name):
            setattr(moved, name, getattr(output, name))
    return moved


def with_tensors_of_base(model: Any, forward: Callable[..., Any]) -> Any:
    """Call a function while the tensors that the model without its head holds itself are loaded."""
    base = base_of(model)
    if base is model or not offloads(base):
        return forward()
    hook = base.__dict__[HOOK]
    hook.pre_forward(base)
    try:
        return forward()
    finally:
        hook.post_forward(base, None)
