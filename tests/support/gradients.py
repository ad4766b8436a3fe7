"""Training steps, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def step(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward and backward; return the loss and a copy of each gradient by parameter name."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def gradients_of_step(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run forward and backward; return a copy of each gradient by parameter name."""
    return step(model, inputs)[1]


def gradients(model: Any) -> dict[str, Tensor]:
    """Copy the gradients that there are, by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], rel: float = 1e-4, atol: float = 1e-4
) -> None:
    """Assert equal names and close values; `atol` is relative to the largest value of each gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        room = atol * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(
            found[name], gradient, rtol=rel, atol=room, msg=lambda m, n=name: f"{n}: {m}"
        )
