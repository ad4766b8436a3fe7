"""The exit: the vision tokens are gone from one layer on."""

from __future__ import annotations

import pytest

from hidrop_fx import passes
from hidrop_fx.ops import tokens
from tests.support.captured import FULL, LAYERS, CapturedModel
from tests.support.graphs import (
    calls,
    grown,
    only,
    segments,
)


def test_exit_gathers_the_text(llama: CapturedModel) -> None:
    program = llama.program_before(passes.exit_vision, **FULL)
    hidden, inputs = program.regions[3].hidden, program.inputs
    assert grown(program, passes.exit_vision) == {
        "placeholder": 1, "text_columns": 1, "find_columns": 1, "take_tokens": 3,
    }  # fmt: skip
    assert program.inputs == [*inputs, "slots_exit_3"]
    assert segments(program)[-1] == ("exit_3", 3)
    columns = only(calls(program.graph, tokens.text_columns))
    assert columns.args[0] is program.segments[2].columns
    taken = program.regions[3].hidden
    assert taken.target is tokens.take_tokens
    assert taken.args[0] is hidden


@pytest.mark.parametrize("layer", [None, LAYERS])
def test_no_exit_and_an_exit_after_the_last_layer_change_nothing(
    llama: CapturedModel, layer: int | None
) -> None:
    program = llama.program_before(passes.exit_vision, **(FULL | {"exit": layer}))
    before = str(program.graph)
    result = program.apply(passes.exit_vision)
    assert (result.matched, result.note) == (0, "no layer after the exit")
    assert str(program.graph) == before
    assert segments(program)[-1] == ("prune_2", 2)
