"""Lower what one backbone runs, prefill, decode and a training step, and print what Inductor wrote, as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

import hidrop_fx as hidrop
from tests.support import counter
from tests.support.models import IMAGE, batch, supervised, tiny_llava
from tests.support.sm90 import attention, lowering, target

SCHEDULE = "inject=1,prune=1:6,exit=2"
"""A layer of each sort: plain, filter, and behind the exit."""
SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 128, "heads": 4, "kv_heads": 2}
ROWS = [[5, 6, IMAGE, 7, 8, 9], [10, IMAGE, 11, 12, 13, IMAGE, 14]]


def lower(backbone: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return what was lowered for generation and for a training step of one backbone."""
    torch.set_num_threads(1)
    lowering.install()
    torch._dynamo.reset()
    window = {"sliding_window": 6} if backbone == "mistral" else {}
    model: Any = tiny_llava(backbone, dtype=dtype, **SIZES, **window).to("cuda")
    options: dict[str, Any] = {"cuda_graphs": False, "overlap_vision": False}
    model = hidrop.compile(model, SCHEDULE, backend="inductor", **options)
    with counter.expect(fallbacks=range(1000)) as made:
        model.generate(**batch(model, ROWS), max_new_tokens=2, do_sample=False)
        model.train()
        model(**supervised(model, ROWS, spans=4)).loss.backward()
    return {
        "graphs": [dataclasses.asdict(graph) for graph in lowering.LOWERED],
        "kernels": len(target.KERNELS),
        "configurations": sum(target.KERNELS.values()),
        "failures": target.FAILURES,
        "fallbacks": made.fallbacks,
        "breaks": list(torch._dynamo.utils.counters["graph_break"]),
        "attention": dict(attention.CHOSEN),
    }


if __name__ == "__main__":
    print(json.dumps(lower(sys.argv[1])))
