"""The head: the rows and columns that a program returns."""

from __future__ import annotations

from hidrop_fx import passes
from hidrop_fx.ops import tokens
from tests.support.captured import FULL, CapturedModel
from tests.support.graphs import (
    calls,
    grown,
)


def test_head_returns_all_rows_and_every_segments_columns(llama: CapturedModel) -> None:
    program = llama.program_before(passes.head, **FULL)
    hidden = program.outputs["hidden"]
    # inputs_embeds, position_ids and mask are read by nothing any more.
    assert grown(program, passes.head) == {"placeholder": -3}
    assert list(program.outputs) == [
        "hidden", "columns_text", "columns_inject_1", "columns_prune_2", "columns_exit_3",
    ]  # fmt: skip
    assert program.outputs["hidden"] is hidden
    assert list(program.outputs.values())[1:] == [s.columns for s in program.segments]
    assert not {"inputs_embeds", "position_ids", "mask"} & set(program.inputs)


def test_head_normalises_the_chosen_rows_only(llama: CapturedModel) -> None:
    program = llama.program_before(passes.head, "prefill", **FULL)
    state = program.regions[-1].live_out
    norm = list(state.users)
    assert grown(program, passes.head, chosen=True) == {
        "placeholder": -2, "find_columns": 1, "take_tokens": 1,
    }  # fmt: skip
    assert program.inputs[-1] == "output_columns"
    rows = calls(program.graph, tokens.take_tokens)[-1]
    places = calls(program.graph, tokens.find_columns)[-1]
    assert rows.args == (state, places)
    assert [str(a) for a in places.args] == [str(program.segments[-1].columns), "output_columns"]
    assert list(state.users) == [rows]
    assert list(rows.users) == norm


def test_head_of_decode_returns_the_new_rows_only(llama: CapturedModel) -> None:
    program = llama.program_before(passes.head, "decode", **FULL)
    assert grown(program, passes.head) == {"placeholder": -1}
    assert list(program.outputs) == ["hidden"]
