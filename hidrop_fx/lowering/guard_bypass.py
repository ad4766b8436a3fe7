"""Bypass Dynamo's guard evaluation for calls whose exact shapes and strides were seen before.

bypass = bypass_for(args, result, call)     # after a call through torch.compile
if bypass.fits(args): result = bypass(args)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.surroundings import has_function_modes


@dataclass(frozen=True)
class CompiledCall:
    """A call that torch.compile made of compiled code."""

    compiled: Callable[..., Any]
    values: Sequence[Any]
    """Arguments of the layer body, and sizes taken from them, in the order of the code."""
    outputs: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class GuardBypass:
    """Compiled code, and guards for the one kind of call that it is known to serve.

    torch.compile takes some 0.3 ms of Python a call to select the code, between two large products.
    These guards are Dynamo's own, but with every size and stride exact, so that they pass no call
    that torch.compile would compile anew.
    """

    compiled: Callable[..., Any]
    global_state: Any
    guards: Any
    sizes: tuple[int, ...]
    inputs: tuple[int, ...]
    """Position of each input of the code in `(*args, *sizes)`."""
    outputs: int | tuple[int, ...]
    """Position of each output of the body in the outputs of the code."""

    def fits(self, args: tuple[Tensor, ...]) -> bool:
        """Return True if the code serves a call with these arguments."""
        return bool(
            self.global_state.check() and not has_function_modes() and self.guards.check(*args)
        )

    def __call__(self, args: tuple[Tensor, ...]) -> Any:
        """Call the code."""
        values = (*args, *self.sizes)
        found = self.compiled(*[values[place] for place in self.inputs])
        if isinstance(self.outputs, int):
            return found[self.outputs]
        return tuple(found[place] for place in self.outputs)


def bypass_for(args: tuple[Tensor, ...], result: Any, call: CompiledCall) -> GuardBypass | None:
    """Make a bypass from a call that went through torch.compile.

    Returns:
        None if body and code do not take and return the same plain tensors, or if one tensor is
        passed twice: Dynamo compiles for that, and guards on it, which these guards do not.
    """
    results = result if isinstance(result, tuple) else (result,)
    sizes = tuple(v for v in call.values if type(v) is int)
    known = {id(v): place for place, v in enumerate(args)}
    made = {id(v): place for place, v in enumerate(call.outputs)}
    tensors = [v for v in call.values if type(v) is not int]
    plain = len(known) == len(args) and all(type(v) in (Tensor, nn.Parameter) for v in args)
    if not plain or any(id(v) not in known for v in tensors):
        return None
    if any(id(v) not in made for v in results) or has_function_modes():
        return None
    guards = _exact_guards(args)
    if guards is None:
        return None
    free = iter(range(len(args), len(args) + len(sizes)))
    outputs = tuple(made[id(v)] for v in results)
    return GuardBypass(
        compiled=call.compiled,
        global_state=torch._C._dynamo.guards.GlobalStateGuard(),
        guards=guards,
        sizes=sizes,
        inputs=tuple(next(free) if type(v) is int else known[id(v)] for v in call.values),
        outputs=outputs if isinstance(result, tuple) else outputs[0],
    )


def _exact_guards(args: tuple[Tensor, ...]) -> Any:
    """Return Dynamo's tensor guards with exact sizes and strides; None if this private API changed."""
    try:
        return torch._C._dynamo.guards.TensorGuards(
            *args,
            dynamic_dims_sizes=[list(v.shape) for v in args],  # type: ignore[misc]
            dynamic_dims_strides=[list(v.stride()) for v in args],  # type: ignore[misc]
        )
    except (AttributeError, TypeError):
        return None
