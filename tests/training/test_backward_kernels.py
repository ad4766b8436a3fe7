"""Which operators a backward pass runs: none that accumulates by index, which sorts the indices on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import hidrop_fx as hidrop
from tests.support.models import IMAGE, batch, random_labels, tiny_llava


class Sorting(TorchDispatchMode):
    """Note the shapes of what is accumulated by an index that may name a place twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("index_put", "_index_put_impl", "_unsafe_index_put") and args[3:4] == (True,):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "schedule",
    [
        "inject=1,prune=1:6+2:3,exit=3",
        "prune=1:6+2:3,positions=compact",
        "inject=1,prune=1:6+2:3,selection=dtopk",
        "prune=1:6+2:3,merge=nearest_key",
        "fastv(layer=2,keep=0.5)",
    ],
)
def test_no_backward_accumulates_by_index(schedule: str) -> None:
    """Features of images in rows of different lengths, tokens that stay, their keys and the queries that score."""
    model = tiny_llava("llama").train()
    hidrop.compile(model, schedule, backend="eager")
    inputs = batch(model, [[5, 6, IMAGE, 7, 8, 9], [8, 9]], padding="right")
    loss = model(**inputs, labels=random_labels(inputs, seed=0)).loss
    with Sorting() as sorting:
        loss.backward()
    assert sorting.shapes == []
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
