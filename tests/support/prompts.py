"""Prompts of the tests of generation, and how close logits have to be."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from tests.support.models import (
    IMAGE,
    PRUNED,
)

Row = list[int | str]
Side = Literal["left", "right"]
ROW: Row = [5, 6, IMAGE, 7, 8, 9]
ROWS: list[Row] = [
    ROW,
    [8, IMAGE],
    [4, 5, 6, 7, 8],
    [IMAGE, 5, IMAGE, 12, 13],
]
each_schedule = pytest.mark.parametrize("schedule", ["identity", PRUNED])
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
