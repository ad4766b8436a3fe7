"""The way around torch.compile's look-up, for calls that its guards would let through anyway.

known = shortcut(args, result, call)     # after a call through torch.compile
if known.fits(args): result = known(args)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GraphCall:
    """A call of compiled code by torch.compile: the arguments of a body, and sizes taken from them."""

    compiled: Callable[..., Any]
    values: Sequence[Any]
    outputs: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """Compiled code, and the one kind of call that it is known to serve.

    To look it up, torch.compile takes some 0.3 ms a call between two large products, which is all
    Python. The guards are its own, but with every size and stride exact, so that no call passes
    that would be compiled anew.
    """

    compiled: Callable[..., Any]
    state: Any
    guards: Any
    sizes: tuple[int, ...]
    inputs: tuple[int, ...]
    """Places of what the code takes among arguments and sizes."""
    outputs: int | tuple[int, ...]
    """Places of what the body returns in what the code returns."""

    def fits(self, args: tuple[Tensor, ...]) -> bool:
        return bool(
            self.state.check()
            and torch._C._len_torch_function_stack() == 0
            and self.guards.check(*args)
        )

    def __call__(self, args: tuple[Tensor, ...]) -> Any:
        values = (*args, *self.sizes)
        found = self.compiled(*[values[place] for place in self.inputs])
        if isinstance(self.outputs, int):
            return found[self.outputs]
        return tuple(found[place] for place in self.outputs)


def shortcut(args: tuple[Tensor, ...], result: Any, call: GraphCall) -> Shortcut | None:
    """None where code and body do not take and return the same plain tensors, or take one twice: code
    that is compiled for that reads it once, and its guards, which are not ours, know.
    """
    results = result if isinstance(result, tuple) else (result,)
    sizes = tuple(v for v in call.values if type(v) is int)
    known = {id(v): place for place, v in enumerate(args)}
    made = {id(v): place for place, v in enumerate(call.outputs)}
    tensors = [v for v in call.values if type(v) is not int]
    plain = len(known) == len(args) and all(type(v) in (Tensor, nn.Parameter) for v in args)
    if not plain or any(id(v) not in known for v in tensors):
        return None
    if any(id(v) not in made for v in results) or torch._C._len_torch_function_stack():
        return None
    guards = _exact_guards(args)
    if guards is None:
        return None
    free = iter(range(len(args), len(args) + len(sizes)))
    outputs = tuple(made[id(v)] for v in results)
    return Shortcut(
        compiled=call.compiled,
        state=torch._C._dynamo.guards.GlobalStateGuard(),
        guards=guards,
        sizes=sizes,
        inputs=tuple(next(free) if type(v) is int else known[id(v)] for v in call.values),
        outputs=outputs if isinstance(result, tuple) else outputs[0],
    )


def _exact_guards(args: tuple[Tensor, ...]) -> Any:
    """torch's own check of tensors, which is not public; None where it has changed."""
    try:
        return torch._C._dynamo.guards.TensorGuards(
            *args,
            dynamic_dims_sizes=[list(v.shape) for v in args],  # type: ignore[misc]
            dynamic_dims_strides=[list(v.stride()) for v in args],  # type: ignore[misc]
        )
    except (AttributeError, TypeError):
        return None
