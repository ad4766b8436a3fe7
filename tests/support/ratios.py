"""Models that learn ratios."""

from __future__ import annotations

from functools import partial
from typing import Any

import hidrop_fx as hidrop
from tests.support.models import IMAGE, supervised, tiny_llava

HARD = "inject=1,prune=1:6+2:3"
DTOPK = HARD + ",selection=dtopk"
ROWS = [[5, 6, IMAGE, 7, 8, 9, 10], [11, IMAGE, 12, 13, 14, 15], [16, 17, 18, 19]]
supervised_batch = partial(supervised, rows=ROWS, label_seed=3)
TRAINED: dict[Any, Any] = {}
"""Models of `trained`, each with the ratios that it started with."""


def trained(schedule: str = DTOPK, **options: Any) -> Any:
    """A model in train mode, for all tests to use: its ratios go back to their start after each."""
    key = (schedule, *options.items())
    if key not in TRAINED:
        model = new(schedule, **options)
        ratios = getattr(model, "hidrop_ratios", None)
        TRAINED[key] = model, None if ratios is None else ratios.values.detach().clone()
    return TRAINED[key][0]


def new(schedule: str = DTOPK, **options: Any) -> Any:
    """Compile a model in train mode for one test alone."""
    return hidrop.compile(tiny_llava(num_layers=3, **options), schedule, backend="eager").train()
