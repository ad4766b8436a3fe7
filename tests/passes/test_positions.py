"""Positions: persistent, compact and grouped ids."""

from __future__ import annotations

from typing import Any

import pytest

from hidrop_fx import passes
from hidrop_fx.ops import tokens
from tests.support.captured import FULL, CapturedModel
from tests.support.generation import KEEPS_IMAGES_TOGETHER
from tests.support.graphs import (
    calls,
    grown,
    only,
    ropes,
    total,
)

# What it takes to make cos and sin for other position ids.
ROPE = {
    "unsqueeze.default": 1, "to.dtype": 3, "to.device": 1, "mul.Tensor": 3,
    "cat.default": 1, "cos.default": 1, "sin.default": 1,
}  # fmt: skip


def test_persistent_positions_change_nothing(llama: CapturedModel) -> None:
    program = llama.program_before(passes.positions, **FULL)
    before = str(program.graph)
    assert program.apply(passes.positions).matched == 0
    assert str(program.graph) == before


@pytest.mark.skipif(
    not KEEPS_IMAGES_TOGETHER, reason="Llama's RoPE was other operators before 5.23"
)
def test_compact_renumbers_after_every_prune_and_exit(llama: CapturedModel) -> None:
    schedule: dict[str, Any] = {
        "inject": 0,
        "prune": {1: 5, 2: 2},
        "exit": 3,
        "positions": "compact",
    }
    program = llama.program_before(passes.positions, **schedule)
    gathered = [list(s.live_ins.values()) for s in program.segments]
    # One more RoPE table, of 0, 1, 2, ..., and the places of three segments in it.
    assert grown(program, passes.positions) == total(ROPE, renumber=4)
    assert program.history[-1].result.matched == 3
    assert [list(s.live_ins.values()) for s in program.segments] == gathered
    numbers, *places = calls(program.graph, tokens.renumber)
    assert numbers.args == (program.placeholder_named("column_position_ids"),)
    assert [n.args for n in places] == [(s.columns,) for s in program.segments[2:]]
    tables = ropes(program)[:2]
    for segment, place in zip(program.segments[2:], places, strict=True):
        assert [n.args for n in segment.live_ins.values()] == [(table, place) for table in tables]
    assert [n.args[0] for n in gathered[1]] == list(program.tables.rope.values())
    # The second filter layer's query rows have the ids that the first one gave.
    assert all(
        [user.target for user in row.users].count(tokens.take_tokens) == 1 for row in gathered[2]
    )


def test_compact_without_a_prune_or_an_exit_changes_nothing(llama: CapturedModel) -> None:
    program = llama.program_before(passes.positions, inject=1, positions="compact")
    before = str(program.graph)
    assert program.apply(passes.positions).matched == 0
    assert str(program.graph) == before


def test_group_renumbers_the_table_once_for_all(llama: CapturedModel) -> None:
    program = llama.program_before(passes.positions, **FULL, positions="group")
    table = program.placeholder_named("column_position_ids")
    readers = list(table.users)
    assert grown(program, passes.positions) == {"renumber_text": 1}
    renumbered = only(calls(program.graph, tokens.renumber_text))
    assert list(table.users) == [renumbered]
    assert list(renumbered.users) == readers
    assert [str(a) for a in renumbered.args] == ["column_position_ids", "column_is_vision"]
