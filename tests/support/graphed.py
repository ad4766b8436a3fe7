"""Models that run on static buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.models import IMAGE
from tests.support.reference import reference_generate

MULTIPLE = 8
NEW = 20
ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
Models = Callable[..., Any]


def reference_tokens(plain: Any, model: Any, inputs: dict[str, Tensor], new: int = NEW) -> Any:
    """Generate what the reference generates under the schedule of a compiled model."""
    return reference_generate(plain, runtime_of(model).schedule, inputs, new)
