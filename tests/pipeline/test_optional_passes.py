"""Passes that may be left out change how a program computes, and not what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hidrop_fx import PassError, Plan, Schedule
from hidrop_fx.pipeline.pipeline import build_program, optional_passes
from hidrop_fx.program.variant import Kind, Variant
from tests.support.captured import LAYERS, WIDTH, CapturedModel
from tests.support.models import schedules
from tests.support.programs import ROWS, kv_buffers, layout_and_tensors, run


def chosen_states(model: CapturedModel, kind: Kind, plan: Plan, disable: set[str]) -> Tensor:
    """Return the last hidden state of each row of `ROWS` as a program without some passes computes it."""
    embeds = torch.randn(len(ROWS), 10, WIDTH, generator=torch.Generator().manual_seed(1))
    program = build_program(
        model.captured, plan, kind, Variant(output="chosen"), disable=sorted(disable)
    )
    applied = {stage.name for stage in program.history}
    assert ("kv_cache" in applied) == (kind == "prefill" and "kv_cache" not in disable)
    layout, tensors = layout_and_tensors(plan.schedule, ROWS, embeds)
    outputs = run(program, tensors | kv_buffers(layout, program, len(ROWS), 0))
    hidden, columns = outputs["hidden"], outputs.get(f"columns_{program.segments[-1].name}")
    if "head" not in disable:
        assert hidden.shape == (len(ROWS), 1, WIDTH)
        return hidden[:, 0]
    assert columns is not None
    places = [columns[b].tolist().index(last) for b, last in enumerate(layout.last)]
    return torch.stack([hidden[b, place] for b, place in enumerate(places)])


@settings(max_examples=12)
@given(
    schedule=schedules(LAYERS, image_tokens=5),
    disable=st.sets(st.sampled_from(sorted(optional_passes())), min_size=1),
    kind=st.sampled_from(["train", "prefill"]),
)
def test_programs_without_any_subset_of_optional_passes_compute_the_same(
    llama: CapturedModel, schedule: dict[str, Any], disable: set[str], kind: Kind
) -> None:
    plan = Plan.of(Schedule(**schedule), LAYERS)
    expected = chosen_states(llama, kind, plan, set())
    found = chosen_states(llama, kind, plan, disable)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_other_pass_is_refused_as_not_optional(llama: CapturedModel) -> None:
    passes = {stage.name for stage in llama.finished("prefill", inject=1, prune={2: 2}).history}
    assert set(optional_passes()) < passes
    for name in sorted(passes - set(optional_passes()) - {"captured"}):
        with pytest.raises(PassError, match=rf"^pass '{name}' cannot be disabled; .* attention"):
            build_program(llama.captured, Plan.of(Schedule(), LAYERS), "prefill", disable=(name,))
