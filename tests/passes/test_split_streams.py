"""The split: programs take text and vision apart, and layers read tables gathered by column."""

from __future__ import annotations

import dataclasses

import pytest
from torch import fx

from hidrop_fx import PassError, passes
from hidrop_fx.capture.regions import tensor_inputs
from hidrop_fx.ops import tokens
from hidrop_fx.ops.masks import BlockRule, MaskRule, rule_mask
from hidrop_fx.program.variant import Kind
from tests.support.captured import FULL, CapturedModel
from tests.support.graphs import (
    aten,
    calls,
    grown,
    only,
    own_nodes,
    ropes,
    scaled_and_cast,
    segments,
)


def test_split_gives_the_program_its_own_inputs_and_rope_for_the_text(llama: CapturedModel) -> None:
    program = llama.program(**FULL)
    nodes = [own_nodes(region) for region in program.regions]
    captured = program.inputs
    assert grown(program, passes.split_streams) == {
        "placeholder": 4,
        "take_tokens": 2,
    }
    assert program.inputs == [
        *captured, "text_embeds", "text_columns", "column_position_ids", "column_is_vision",
    ]  # fmt: skip
    # RoPE is computed once, for all columns; the text takes its rows.
    assert program.tables.rope == dict(zip(program.tables.rope, ropes(program), strict=True))
    columns = program.placeholder_named("text_columns")
    rows = calls(program.graph, tokens.take_tokens)
    assert [n.args for n in rows] == [(table, columns) for table in program.tables.rope.values()]
    assert program.regions[0].hidden is program.placeholder_named("text_embeds")
    assert segments(program) == [("text", 0)]
    assert list(program.segments[0].live_ins.values()) == rows
    # The layers' own nodes are the same objects, and read the new tables.
    assert [own_nodes(region) for region in program.regions] == nodes
    tables = set(program.segments[0].live_ins.values())
    for region in program.regions:
        assert tables <= set(tensor_inputs(region.nodes))
    assert not program.placeholder_named("inputs_embeds").users
    assert not program.placeholder_named("position_ids").users


def test_split_computes_masks_that_are_not_causal_by_their_rule(
    mistral_window: CapturedModel,
) -> None:
    program, masks = mistral_window.program(**FULL), (("mask", MaskRule(window=5)),)
    assert grown(program, passes.split_streams, masks=masks)["rule_mask"] == 1
    assert program.inputs[-1] == "column_is_vision", "a window needs no input"
    mask = only(calls(program.graph, rule_mask))
    assert mask.args == (program.placeholder_named("text_columns"), None, 5, False)
    assert all(region.attention.args[3] is mask for region in program.regions)


@pytest.mark.parametrize("rule", ["within", "beyond"])
def test_split_gives_masks_with_blocks_the_block_of_each_column(
    mistral_window: CapturedModel, rule: BlockRule
) -> None:
    program = mistral_window.program(**FULL)
    program.apply(passes.split_streams, masks=(("mask", MaskRule(window=5, blocks=rule)),))
    assert program.inputs[-1] == "column_blocks"
    blocks = program.placeholder_named("column_blocks")
    assert (
        blocks.meta["val"].shape == program.placeholder_named("column_is_vision").meta["val"].shape
    )
    columns = program.placeholder_named("text_columns")
    assert only(calls(program.graph, rule_mask)).args == (columns, blocks, 5, rule == "beyond")


def test_split_of_decode_lists_every_segment_of_the_plan(llama: CapturedModel) -> None:
    program = llama.program("decode", **FULL)
    before = program.inputs
    assert grown(program, passes.split_streams) == {}
    assert program.history[-1].result.matched == 4
    assert program.inputs == before
    assert segments(program) == [("text", 0), ("inject_1", 1), ("prune_2", 2), ("exit_3", 3)]
    captured = {live_in: live_in for live_in in ropes(program)}
    assert all(s.live_ins == captured and s.columns is None for s in program.segments)


def test_split_of_decode_takes_position_ids_per_segment_where_positions_are_compact(
    llama: CapturedModel,
) -> None:
    program = llama.program("decode", **FULL, positions="compact")
    # The ids of each segment that is renumbered have their own RoPE tables.
    grown_by = grown(program, passes.split_streams)
    assert {k: grown_by[k] for k in ("placeholder", "cos.default", "sin.default")} == {
        "placeholder": 2, "cos.default": 2, "sin.default": 2,
    }  # fmt: skip
    assert program.inputs[-2:] == ["position_ids_prune_2", "position_ids_exit_3"]
    text, inject, *renumbered = [list(s.live_ins.values()) for s in program.segments]
    assert text == inject
    # One input, its RoPE, the next input, its RoPE.
    assert [text, *renumbered] == [ropes(program)[k : k + 2] for k in (0, 2, 4)]


def test_split_refuses_an_input_of_the_layers_that_is_no_mask(llama: CapturedModel) -> None:
    captured = dataclasses.replace(llama.captured, masks=())
    with pytest.raises(
        PassError,
        match=r"^layers\.0 reads the input mask \(s\d+, 1, s\d+, s\d+\) \[mask\], which is neither a mask "
        r"nor made from position ids",
    ):
        llama.program(captured=captured, **FULL).apply(passes.split_streams)


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_split_refuses_a_live_in_that_depends_on_hidden_states(
    llama: CapturedModel, kind: Kind
) -> None:
    def scale_cos_by_a_state(graph: fx.Graph) -> None:
        cos = only(calls(graph, aten.cos.default))
        embeds = next(n for n in graph.nodes if n.name == "inputs_embeds")
        with graph.inserting_after(cos):
            mean = graph.call_function(aten.mean.dim, (embeds, [-1], True))
        mean.meta["val"] = embeds.meta["val"][:, :, :1]
        with graph.inserting_after(mean):
            scaled = graph.call_function(aten.mul.Tensor, (cos, mean))
        scaled.meta["val"] = cos.meta["val"]
        cos.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    captured = llama.edited(scale_cos_by_a_state)
    with pytest.raises(
        PassError,
        match=r"depends on inputs_embeds \(.*, 32\) \[inputs_embeds\], and not only on "
        r"position_ids .*; it cannot be computed for other tokens",
    ):
        llama.program(kind, captured=captured, **FULL, positions="compact").apply(
            passes.split_streams
        )


def test_split_refuses_a_live_in_that_is_not_one_row_a_token(llama: CapturedModel) -> None:
    def turn_cos(graph: fx.Graph) -> None:
        cos = scaled_and_cast(only(calls(graph, aten.cos.default)))
        with graph.inserting_after(cos):
            turned = graph.call_function(aten.transpose.int, (cos, 0, 1))
        turned.meta["val"] = cos.meta["val"].transpose(0, 1)
        cos.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)

    captured = llama.edited(turn_cos)
    with pytest.raises(
        PassError,
        match=r"^layers\.0 reads .* which is not one row for each token of a batch",
    ):
        llama.program(captured=captured, **FULL).apply(passes.split_streams)
