"""Collectives of tensor parallelism as plain tensor functions, each with the derivative that it needs.

    y = linear(enter(x), columns)               # of the weight: this process's heads or channels of y
    y = leave(linear(y, rows))                  # sums over processes: y is whole again

A value is *whole* where every process holds all of it, and *divided* where each holds a part. The gradient of a whole value
is whole too: what reads it into a divided computation must `enter`, so that the processes' gradients are summed.

While a decoder is captured, the first four are opaque operators without a kernel, as its attentions are, since a trace
would write out what they do forward and lose the derivatives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def enter(x: Tensor, group: str) -> Tensor:
    """Return a whole value as the input of a divided computation; backward sums over the group."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Enter.apply(x, group)
        return result
    return x


def leave(x: Tensor, group: str) -> Tensor:
    """Sum the processes' terms of a value, which is whole then; backward passes the gradient on."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Leave.apply(x, group)
        return result
    return _sum(x, group)


def gather(x: Tensor, dim: int, before: int, after: int, group: str) -> Tensor:
    """Put the processes' parts of a value side by side; backward takes the own part.

    Args:
        dim: along which it is divided.
        before, after: sizes of what the processes before and behind this one hold.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Gather.apply(x, dim, before, after, group)
        return result
    return _gathered(x, dim, before, after, group)


def part(x: Tensor, dim: int, before: int, size: int, group: str) -> Tensor:
    """Take this process's part of a whole value; backward puts the parts side by side."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Part.apply(x, dim, before, size, group)
        return result
    return x.narrow(dim, before, size)


def mean_of_processes(x: Tensor, group: str, size: int) -> Tensor:
    """Average a value over the `size` processes of a group: the same bits in each of them."""
    return leave(x, group) / size


def of_first_process(x: Tensor, group: str) -> Tensor:
    """Return the value that the first process of a group holds; no gradient passes."""
    sent = torch.ops._c10d_functional.broadcast(x.detach().contiguous(), 0, group)
    result: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return result


def _sum(x: Tensor, group: str) -> Tensor:
    sent = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
    result: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return result


def _gathered(x: Tensor, dim: int, before: int, after: int, group: str) -> Tensor:
    # A sum with zeros, which is exact: parts may differ in size, as those of an all-gather may not.
    behind = x.dim() - 1 - dim % x.dim()
    return _sum(F.pad(x, (0, 0) * behind + (before, after)), group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, before: int, after: int, group: str) -> Tensor:
        ctx.place = dim, before, x.shape[dim]
        return _gathered(x, dim, before, after, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.narrow(*ctx.place), None, None, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, before: int, size: int, group: str) -> Tensor:
        ctx.place = dim, before, x.shape[dim] - before - size, group
        return x.narrow(dim, before, size).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(gradient, *ctx.place), None, None, None, None


# Marks in a captured graph.


@torch.library.custom_op("hidrop::tp_enter", mutates_args=())
def captured_enter(x: Tensor, group: str) -> Tensor:
    """Mark where a whole value enters a divided computation."""
    raise _no_kernel()


@torch.library.custom_op("hidrop::tp_leave", mutates_args=())
def captured_leave(x: Tensor, group: str) -> Tensor:
    """Mark where the terms of a value are summed."""
    raise _no_kernel()


@torch.library.custom_op("hidrop::tp_gather", mutates_args=())
def captured_gather(x: Tensor, dim: int, before: int, after: int, group: str) -> Tensor:
    """Mark where parts of a value are put side by side."""
    raise _no_kernel()


@torch.library.custom_op("hidrop::tp_part", mutates_args=())
def captured_part(x: Tensor, dim: int, before: int, size: int, group: str) -> Tensor:
    """Mark where a part of a whole value is taken."""
    raise _no_kernel()


@captured_enter.register_fake
@captured_leave.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@captured_gather.register_fake
def _(x: Tensor, dim: int, before: int, after: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] + before + after
    return x.new_empty(shape)


@captured_part.register_fake
def _(x: Tensor, dim: int, before: int, size: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _no_kernel() -> RuntimeError:
    return RuntimeError("a mark of a captured graph has no kernel")


MARKS = {
    torch.ops.hidrop.tp_enter.default: enter,
    torch.ops.hidrop.tp_leave.default: leave,
    torch.ops.hidrop.tp_gather.default: gather,
    torch.ops.hidrop.tp_part.default: part,
}
"""Marks -> the functions in whose place they stand."""
