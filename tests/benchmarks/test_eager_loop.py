"""The benchmarks' hand-written loop is timed for schedules alone that it follows."""

from __future__ import annotations

import sys

import pytest
import torch

import hidrop_fx as hidrop
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import eager_loop


@pytest.mark.parametrize(
    ("text", "followed"),
    [
        ("hidrop-64", True),
        ("identity", True),
        ("prune=4:0.5", False),
        ("prune=4:8,selection=dtopk", False),
        ("pyramiddrop(layers=(4,8,12))", False),
        ("before=pooling(tokens=36)", False),
    ],
)
def test_a_loop_that_would_leave_something_out_is_not_timed(text: str, followed: bool) -> None:
    schedule = hidrop.Schedule.parse(text, num_layers=16)
    assert eager_loop.follows(schedule) is followed
    if not followed:
        with pytest.raises(ValueError, match="follows no schedule like"):
            eager_loop.prefill(None, schedule, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
