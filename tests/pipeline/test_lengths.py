"""The check of lengths: every node has the length of its segment."""

from __future__ import annotations

import pytest

from hidrop_fx import PassError, Plan, Schedule
from hidrop_fx.ops.masks import MaskRule
from hidrop_fx.pipeline.pipeline import build_program, check_lengths
from hidrop_fx.planning.geometry import depth_of
from hidrop_fx.program.variant import Kind, Variant
from tests.support.captured import FULL, CapturedModel


@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
@pytest.mark.parametrize("positions", ["persistent", "compact"])
def test_every_nodes_length_fits(llama: CapturedModel, kind: Kind, positions: str) -> None:
    schedule = Schedule(**FULL, positions=positions)
    program = build_program(
        llama.captured, Plan.of(schedule, depth_of(llama.model)), kind, Variant(output="chosen")
    )
    check_lengths(program, every_node=True)


def test_every_nodes_length_fits_with_masks(qwen_window: CapturedModel) -> None:
    for kind in ("prefill", "decode"):
        program = build_program(
            qwen_window.captured, Plan.of(Schedule(**FULL), depth_of(qwen_window.model)), kind,
            Variant(masks=(("mask_sliding_attention", MaskRule(window=5)),), masked=True),
        )  # fmt: skip
        check_lengths(program, every_node=True)


def test_a_layer_that_reads_the_wrong_segment_is_found(llama: CapturedModel) -> None:
    program = build_program(
        llama.captured, Plan.of(Schedule(**FULL), depth_of(llama.model)), "train"
    )
    region, whole = program.regions[3], program.regions[2].live_out
    region.read(region.hidden, whole)
    region.hidden = whole
    with pytest.raises(
        PassError,
        match=r"^layers\.3 should see the tokens of exit_3, but add_\w+ \(batch, prune_2, 32\) .* has those of prune_2$",
    ):
        check_lengths(program)
