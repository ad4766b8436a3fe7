"""A loss whose logits are never there all at once: some rows at a time go through head and loss, forward and backward.

    for rows, targets in zip(hidden.split(n), targets.split(n)):
        part = loss(head(rows), targets)                    # [n, V], freed before the next
        total += part; grads += grad(part, [rows, *head])   # backward multiplies them

Gradients are made in forward, as Liger's kernel makes them: a step computes each row's logits once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 1024
"""Rows whose logits are there at a time."""

PartLoss = Callable[[Tensor, Tensor], Tensor]
"""The loss [] summed over rows [n, D], of targets [n]."""


def summed_loss(
    hidden: Tensor,
    targets: Tensor,
    part: PartLoss,
    parameters: Sequence[Tensor],
    rows: int = ROWS,
) -> Tensor:
    """Return the sum of a loss over rows, fp32 [], with gradients to them and to the head.

    Gradients of 16-bit parameters are added up in fp32.

    Args:
        hidden: [R, D], R > 0.
        targets: int64 [R].
        part: calls the head; draws random numbers, if any, once for each row.
        parameters: that it reads.
        rows: the number of rows whose logits are there at a time.
    """
    learning = any(value.requires_grad for value in (hidden, *parameters))
    if not (learning and torch.is_grad_enabled()):
        parts = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.stack([part(x, y).float() for x, y in parts]).sum()
    found: Tensor = _Summed.apply(hidden, targets, part, rows, *parameters)
    return found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, part: PartLoss, rows: int, *parameters: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=targets.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = [None] * len(parameters)
        learning = [k for k, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        start = 0
        for x, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_(of_hidden is not None)
                loss = part(x, y)
            wanted = [x] * (of_hidden is not None) + [parameters[k] for k in learning]
            grads = list(torch.autograd.grad(loss, wanted, allow_unused=True))
            total += loss.detach()
            if of_hidden is not None:
                of_hidden[start : start + len(x)] = grads.pop(0)
            start += len(x)
            for k, grad in zip(learning, grads, strict=True):
                of_head[k] = _added(of_head[k], grad, last=start == len(hidden))
        ctx.save_for_backward(of_hidden, *of_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_head = (
            None if found is None else found * grads[0].to(found.dtype)
            for found in ctx.saved_tensors
        )
        return of_hidden, None, None, None, *of_head


def _added(total: Any, grad: Any, *, last: bool) -> Any:
    """Add a gradient of some rows, in fp32, and return the sum in the gradient's dtype behind the last ones."""
    if grad is None or total is None:
        found = total if grad is None else grad
        return found if last or found is None else found.float()
    total += grad
    return total.to(grad.dtype) if last else total
