"""Training under two schedules in turn, in two processes: what `test_dual_training` runs in each."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import hidrop_fx as hidrop
from tests.support.sharded import (
    ROWS,
    WORDS,
    apart,
    full_gradients,
    full_parameters,
    inputs_of,
    mean_of_ranks,
    model_of,
    shard,
)

NAMED = {"fast": "inject=1,prune=1:6+2:3,exit=3", "full": hidrop.Schedule()}
KINDS = ["fast", "full", "fast"]


def compiled() -> Any:
    return hidrop.compile(model_of(), NAMED, backend="eager").train()


def trained(model: Any, batches: list[dict[str, Any]], distill: Any) -> dict[str, Any]:
    """Take three steps on the mean of the losses of some batches; return losses, gradients of each step, parameters."""
    training = hidrop.DualTraining(share=0.5, distill=distill, seed=108)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Any] = {"losses": [], "kinds": [], "gradients": []}
    for number in range(len(KINDS)):
        optimizer.zero_grad()
        total = 0.0
        with training.step(model, number) as kind:
            for inputs in batches:
                loss = model(**inputs).loss / len(batches)
                loss.backward()
                total += float(loss.detach())
        found["kinds"].append(kind)
        found["losses"].append(total)
        found["gradients"].append(full_gradients(getattr(model, "module", model)))
        optimizer.step()
    return found | {"parameters": full_parameters(getattr(model, "module", model))}


def _compared(rank: int, rows: Any, wrapped: Any, distill: str) -> dict[str, Any]:
    model: Any = compiled()
    expected: dict[str, Any] = {}
    if rank == 0:
        expected = trained(compiled(), [inputs_of(model, each) for each in rows], distill)
    found = trained(wrapped(model), [inputs_of(model, rows[rank])], distill)
    losses = mean_of_ranks(found["losses"])
    wanted = expected.get("losses", losses)
    gradients = expected.get("gradients", [None] * len(KINDS))
    pairs = zip(found["gradients"], gradients, strict=True)
    return {
        "kinds": found["kinds"],
        "losses": max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)),
        "gradients": max(apart(a, b) for a, b in pairs),
        "parameters": apart(found["parameters"], expected.get("parameters")),
        "count": len(found["gradients"][0]),
    }


def ddp(rank: int) -> Any:
    def parallel(model: Any) -> Any:
        """The last layer of the tower is not used."""
        return DistributedDataParallel(model, find_unused_parameters=True)

    return _compared(rank, ROWS, parallel, "full_from_fast")


def fsdp2(rank: int) -> Any:
    """The second rank has no image."""
    return _compared(rank, WORDS, shard, "fast_from_full")
