"""The prune: the score of a filter layer, the survivors, and what is computed for the dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from hidrop_fx import PassError, passes
from hidrop_fx.methods.random import random_scores
from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention_scores import attention_scores
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.program import PassResult, Program
from tests.support.captured import FULL, CapturedModel
from tests.support.graphs import (
    aten,
    calls,
    grown,
    only,
    own_nodes,
    segments,
    total,
)

# What it takes to project and rotate one of q and k.
PROJECT = {
    "sym_size.int": 2, "to.dtype": 2, "pow.Tensor_Scalar": 1, "mean.dim": 1, "add.Tensor": 2,
    "rsqrt.default": 1, "mul.Tensor": 4, "linear.default": 1, "view.default": 1, "transpose.int": 1,
    "unsqueeze.default": 2, "slice.Tensor": 2, "neg.default": 1, "cat.default": 1,
}  # fmt: skip


def test_prune_copies_one_query_and_gathers_the_keys(llama: CapturedModel) -> None:
    program = llama.program_before(passes.prune, **FULL)
    region, inputs = program.regions[2], program.inputs
    hidden, key = region.hidden, region.attention.args[1]
    grown_by = grown(program, passes.prune)
    glue = {
        "find_columns": 2, "take_tokens": 6, "take_keys": 1, "attention_scores": 1, "detached": 1,
        "surviving_columns": 1, "lookup": 0, "placeholder": 3,
    }  # fmt: skip
    assert {k: grown_by.get(k, 0) for k in glue} == glue
    # q and k are copied for the score; the survivors' k is gathered, so the layer's own is gone.
    assert grown_by["linear.default"] == 2 - 1
    assert key not in set(program.graph.nodes)
    assert program.inputs == [*inputs, "keep_2", "slots_prune_2", "query_columns"]
    assert segments(program)[-1] == ("prune_2", 2)

    scores = only(calls(program.graph, attention_scores))
    kept = only(calls(program.graph, tokens.surviving_columns))
    gathered = only(calls(program.graph, tokens.take_keys))
    rows, *row_rope, survivors = calls(program.graph, tokens.take_tokens)[4:-2]
    places, index = calls(program.graph, tokens.find_columns)
    inject = program.segments[1]
    assert [n.args for n in row_rope] == [(live_in, places) for live_in in inject.live_ins.values()]
    # One projection of the keys serves the score and the layer.
    assert gathered.args == (scores.args[1], index)
    assert region.attention.args[1] is gathered
    assert scores.args[2:4] == (inject.columns, program.placeholder_named("query_columns"))
    assert only(calls(program.graph, tokens.detached)).args == (scores,)
    assert kept.args[0] is only(calls(program.graph, tokens.detached))
    assert [str(a) for a in kept.args[2:]] == ["column_is_vision", "keep_2", "slots_prune_2"]
    assert rows.args == (hidden, places)
    assert survivors.args == (hidden, index)
    assert index.args == (inject.columns, kept)
    assert region.hidden is survivors
    assert program.segments[-1].columns is kept


def test_prune_leaves_the_other_layers_and_the_filter_layers_own_nodes_alone(
    llama: CapturedModel,
) -> None:
    program = llama.program_before(passes.prune, **FULL)
    nodes = [own_nodes(r) for r in program.regions]
    program.apply(passes.prune)
    for k, region in enumerate(program.regions):
        if k == 2:
            assert set(own_nodes(region)) < set(nodes[k])
        else:
            assert own_nodes(region) == nodes[k]


def test_prune_counts_every_copied_node(llama: CapturedModel) -> None:
    program = llama.program_before(passes.prune, **FULL, positions="compact")
    glue = {
        "find_columns": 2, "take_tokens": 6, "attention_scores": 1, "detached": 1, "surviving_columns": 1,
        "placeholder": 3,
    }  # fmt: skip
    # DecoderOutput, cos and sin of the survivors and of the query rows; copies of what makes the query and the
    # keys. Both rotate with tables that are unsqueezed within the layer.
    assert grown(program, passes.prune) == total(glue, PROJECT, PROJECT)


def test_prune_projects_the_survivors_keys_again_where_positions_are_compact(
    llama: CapturedModel,
) -> None:
    program = llama.program_before(passes.prune, **FULL, positions="compact")
    key = program.regions[2].attention.args[1]
    assert grown(program, passes.prune)["linear.default"] == 2
    assert program.regions[2].attention.args[1] is key
    assert not calls(program.graph, tokens.take_keys)


def test_nodes_that_make_a_score_form_two_subgraphs(llama: CapturedModel) -> None:
    program = llama.program_before(passes.prune, **FULL)
    program.apply(passes.prune)
    assert set(program.subgraphs.values()) == {"keys_2", "score_2"}
    inside = program.subgraphs
    assert inside[only(calls(program.graph, attention_scores))] == "score_2"
    projections = [name for n, name in inside.items() if n.target is aten.linear.default]
    assert sorted(projections) == ["keys_2", "score_2"]
    assert not inside.keys() & {n for r in program.regions for n in r.nodes}


def test_what_moves_without_backward_is_a_subgraph_too(llama: CapturedModel) -> None:
    program = llama.program_before(passes.prune, "prefill", **FULL)
    before = set(program.graph.nodes)
    program.apply(passes.prune)
    added = {
        n
        for n in program.graph.nodes
        if n not in before and n.op not in ("placeholder", "get_attr")
    }
    assert added == program.subgraphs.keys()
    scored = {n for n, name in program.subgraphs.items() if name in ("keys_2", "score_2")}
    assert only(calls(program.graph, attention_scores)) in scored
    assert {n.target for n in added - scored} == {
        tokens.surviving_columns, tokens.find_columns, tokens.take_tokens, tokens.take_keys,
    }  # fmt: skip
    assert {program.subgraphs[n] for n in added - scored} == {"prune_2"}


def test_a_node_that_a_later_pass_puts_into_a_subgraph_joins_it(llama: CapturedModel) -> None:
    program = llama.finished("prefill", **FULL, positions="compact")
    numbers = [
        n
        for n in calls(program.graph, tokens.renumber)
        if n.all_input_nodes[0] in program.subgraphs
    ]
    assert [program.subgraphs[n] for n in numbers] == ["prune_2"]


def test_a_node_joins_a_subgraph_when_a_second_pass_encloses_it(llama: CapturedModel) -> None:
    """The first only reads it; only with the second is its node in between."""
    program = llama.finished("prefill", **FULL)

    def read(program: Program, plan: Any) -> PassResult:
        program.call(torch.neg, only(calls(program.graph, attention_scores)), before=cut_off())
        program.returns({**program.outputs, "negated": only(calls(program.graph, torch.neg))})
        return PassResult(matched=1)

    def feed(program: Program, plan: Any) -> PassResult:
        cut_off().replace_input_with(cut_off().args[0], only(calls(program.graph, torch.neg)))
        return PassResult(matched=1)

    def cut_off() -> fx.Node:
        return only(calls(program.graph, tokens.detached))

    program.apply(read)
    negated = only(calls(program.graph, torch.neg))
    assert negated not in program.subgraphs
    program.apply(feed)
    assert program.subgraphs[negated] == "score_2"


def test_random_scores_are_drawn_outside_the_subgraph(llama: CapturedModel) -> None:
    program = llama.finished("prefill", **FULL, score="random")
    drawn = only(calls(program.graph, random_scores))
    assert drawn not in program.subgraphs
    assert set(program.subgraphs.values()) == {"prune_2"}


def test_every_filter_layer_scores_the_tokens_that_the_one_before_it_left(
    llama: CapturedModel,
) -> None:
    program = llama.program_before(passes.prune, inject=0, prune={1: 5, 2: 2, 3: 1})
    assert program.apply(passes.prune).matched == 3
    assert program.inputs.count("query_columns") == 1
    assert [n for n in program.inputs if n.startswith(("keep", "slots_prune"))] == [
        "keep_1", "slots_prune_1", "keep_2", "slots_prune_2", "keep_3", "slots_prune_3",
    ]  # fmt: skip
    scores = calls(program.graph, attention_scores)
    assert [n.args[2] for n in scores] == [s.columns for s in program.segments[1:4]]
    assert segments(program)[2:] == [("prune_1", 1), ("prune_2", 2), ("prune_3", 3)]


def test_prune_at_the_layer_of_the_inject_scores_the_merged_tokens(llama: CapturedModel) -> None:
    program = llama.program_before(passes.prune, inject=1, prune={1: 2})
    program.apply(passes.prune)
    merged = only(calls(program.graph, tokens.merge_tokens))
    taken = [n for n in merged.users if n.target is tokens.take_tokens]
    assert taken == [n for n in calls(program.graph, tokens.take_tokens) if n.args[0] is merged]
    assert len(taken) == 2


def test_a_schedule_without_filter_layers_prunes_nothing(llama: CapturedModel) -> None:
    program = llama.program_before(passes.prune, inject=1)
    before = str(program.graph)
    result = program.apply(passes.prune)
    assert (result.matched, result.note) == (0, "the schedule prunes nowhere")
    assert str(program.graph) == before


def test_prune_refuses_keys_that_are_not_made_from_one_token_each(llama: CapturedModel) -> None:
    program = llama.program_before(passes.prune, **FULL)
    region = program.regions[2]
    key = region.attention.args[1]
    assert isinstance(key, fx.Node)
    memory = program.add_input(
        InputSpec(
            "memory", tuple(key.meta["val"].shape), torch.float32, lambda call: call.text_embeds
        )
    )
    mixed = program.call(torch.add, key, memory, before=region.attention)
    region.attention.replace_input_with(key, mixed)
    region.nodes.insert(region.nodes.index(region.attention), mixed)
    with pytest.raises(
        PassError,
        match=r"^cannot score at layers\.2: the queries or keys of attention_2 .*hidrop\.attention.* are "
        r"not made from one token each\. .* depends on memory \(.*\) \[memory\], and not only on "
        r"take_tokens_2 .*, take_tokens_3 .*, add_",
    ):
        program.apply(passes.prune)
