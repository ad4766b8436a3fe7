"""The order of passes, and what is left of the capture afterwards."""

from __future__ import annotations

import pytest

from hidrop_fx.ops.attention import (
    CAPTURED_ATTENTION,
)
from hidrop_fx.ops.masks import MaskRule
from hidrop_fx.pipeline import pipeline
from hidrop_fx.program.variant import Kind, Variant
from tests.support.captured import FULL, CapturedModel
from tests.support.graphs import (
    calls,
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "train",
            ["split_streams", "inject", "prune", "exit_vision", "positions", "attention", "head"],
        ),
        (
            "prefill",
            [
                "split_streams",
                "inject",
                "prune",
                "exit_vision",
                "positions",
                "attention",
                "kv_cache",
                "head",
            ],
        ),
        ("decode", ["split_streams", "kv_cache", "head"]),
    ],
)
def test_pipeline_lists_passes_and_options_in_order(kind: Kind, expected: list[str]) -> None:
    masks = (("mask", MaskRule(window=5)),)
    steps = pipeline.passes_for(kind, Variant(output="chosen", masks=masks, masked=True))
    assert [rewrite.__name__ for rewrite, _ in steps] == expected
    options = {rewrite.__name__: dict(given) for rewrite, given in steps if given}
    if kind == "decode":
        assert options == {"kv_cache": {"masked": True}}
    else:
        assert options == {"split_streams": {"masks": masks}, "head": {"chosen": True}}
    every = pipeline.passes_for(kind, Variant())
    assert all(not any(given.values()) for _, given in every)


def test_no_marker_of_capture_is_left_in_a_finished_program(llama: CapturedModel) -> None:
    for kind in ("train", "prefill", "decode"):
        program = llama.finished(kind, **FULL)
        assert not calls(program.graph, CAPTURED_ATTENTION)
