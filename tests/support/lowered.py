"""Models and programs that are lowered in several ways."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.runtime import Runtime
from tests.support.models import tiny_llava
from tests.support.runtimes import runtime_in

LAYERS, WIDTH = 3, 32


FILTERED = "inject=1,prune=1:4,exit=2"
"""Plain layers 0 and 2, and a filter layer between them."""


def compiled_llama(
    schedule: str = FILTERED, backend: str = "aot_eager", **options: Any
) -> tuple[Any, Runtime]:
    """Compile a tiny Llama whose layers are lowered; return its runtime with it."""
    model = hidrop.compile(
        tiny_llava(num_layers=LAYERS, kv_heads=2), schedule, backend=backend, **options
    )
    runtime = runtime_in(model)
    return model, runtime


def answer(model: Any, inputs: dict[str, Tensor], new_tokens: int = 3) -> list[list[int]]:
    """Generate exactly so many tokens greedily; return them without the prompt."""
    length = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    found: list[list[int]] = out[:, length:].tolist()
    return found
