"""Each pass of the pipeline on a small captured decoder: what it adds, where, what it leaves alone, what it refuses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hidrop_fx import PassError, Schedule, passes, plan
from hidrop_fx.capture.export import CapturedDecoder, capture
from hidrop_fx.capture.regions import Region, tensor_inputs
from hidrop_fx.models import backbone_of
from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention import (
    CAPTURED_ATTENTION,
    cached_attention,
    causal_attention,
    masked_attention,
)
from hidrop_fx.passes.kv_cache import write_kv
from hidrop_fx.pipeline import pipeline
from hidrop_fx.pipeline.pipeline import Variant, build_program, check_lengths
from hidrop_fx.planning.layout import Layout, lay_out
from hidrop_fx.program.program import Kind, PassResult, Program
from tests.support.models import tiny_llava

aten = torch.ops.aten
LAYERS, WIDTH, KV_HEADS, HEAD = 4, 32, 2, 8
FULL: dict[str, Any] = {"inject": 1, "prune": {2: 2}, "exit": 3}
# What it takes to make cos and sin for other position ids.
ROPE = {
    "unsqueeze.default": 1, "to.dtype": 3, "to.device": 1, "mul.Tensor": 3,
    "cat.default": 1, "cos.default": 1, "sin.default": 1,
}  # fmt: skip
# What it takes to project and rotate one of q and k.
PROJECT = {
    "sym_size.int": 2, "to.dtype": 2, "pow.Tensor_Scalar": 1, "mean.dim": 1, "add.Tensor": 2,
    "rsqrt.default": 1, "mul.Tensor": 4, "linear.default": 1, "view.default": 1, "transpose.int": 1,
    "unsqueeze.default": 2, "slice.Tensor": 2, "neg.default": 1, "cat.default": 1,
}  # fmt: skip


class Decoder:
    """A tiny model and its capture."""

    def __init__(self, backbone: str = "llama", window: int | None = None) -> None:
        self.model: Any = tiny_llava(
            backbone, num_layers=LAYERS, kv_heads=KV_HEADS, sliding_window=window
        )
        types = backbone_of(self.model).layer_types(self.model.config.get_text_config())
        self.captured: CapturedDecoder = capture(self.model.get_decoder(), layer_types=types)

    def program(
        self, kind: Kind = "train", captured: CapturedDecoder | None = None, **schedule: Any
    ) -> Program:
        return Program(captured or self.captured, plan(Schedule(**schedule), self.model), kind)

    def program_before(
        self, rewrite: Any, kind: Kind = "train", *, masks: tuple[str, ...] = (), **schedule: Any
    ) -> Program:
        """A program to which the passes that come before `rewrite` were applied."""
        program = self.program(kind, **schedule)
        for step, options in pipeline._pipeline(kind, Variant(masks=masks)):
            if step is rewrite:
                break
            program.apply(step, **options)
        return program

    def finished(self, kind: Kind = "train", output: Any = "all", **schedule: Any) -> Program:
        """What `build_program` gives, without its check of the lengths, which takes most of its time."""
        program = self.program(kind, **schedule)
        for step, options in pipeline._pipeline(kind, Variant(output=output)):
            program.apply(step, **options)
        program.module.recompile()
        return program

    def edited(self, edit: Callable[[fx.Graph], None]) -> CapturedDecoder:
        """A capture with a change to its graph."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.captured.module.graph, {}))
        edit(graph)
        module = fx.GraphModule(self.captured.module, graph)
        return dataclasses.replace(self.captured, module=module)


@pytest.fixture(scope="module")
def llama() -> Decoder:
    return Decoder()


@pytest.fixture(scope="module")
def mistral_window() -> Decoder:
    return Decoder("mistral", 4)


@pytest.fixture(scope="module")
def qwen_window() -> Decoder:
    return Decoder("qwen2", 4)


def counted(graph: fx.Graph) -> Counter[str]:
    """Nodes by target; inputs and parameters by kind."""
    return Counter(
        getattr(n.target, "__name__", str(n.target)) if n.op == "call_function" else n.op
        for n in graph.nodes
    )


def grown(program: Program, rewrite: Any, **options: Any) -> dict[str, int]:
    """Apply a pass; how many nodes of each kind there are more or fewer."""
    before = counted(program.graph)
    program.apply(rewrite, **options)
    after = counted(program.graph)
    return {k: after[k] - before[k] for k in before | after if after[k] != before[k]}


def total(*parts: dict[str, int], **more: int) -> dict[str, int]:
    together: Counter[str] = Counter()
    for part in (*parts, more):
        together.update(part)
    return {k: n for k, n in together.items() if n}


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target is target]


def only(nodes: list[fx.Node]) -> fx.Node:
    (node,) = nodes
    return node


def text(graph: fx.Graph) -> str:
    return str(graph)


def segments(program: Program) -> list[tuple[str, int]]:
    return [(s.name, s.start) for s in program.segments]


def ropes(program: Program) -> list[fx.Node]:
    """Every cos and sin as handed to layers or gathered from, in graph order."""
    made = {*calls(program.graph, aten.cos.default), *calls(program.graph, aten.sin.default)}
    return [scaled_and_cast(node) for node in sorted(made)]


def scaled_and_cast(node: fx.Node) -> fx.Node:
    """The last of the chain of single users that is still a part of RoPE."""
    while (user := next(iter(node.users))).target in (aten.mul.Tensor, aten.to.dtype):
        if len(user.all_input_nodes) > 1:
            break
        node = user
    return node


def own_nodes(region: Region) -> list[fx.Node]:
    return [n for n in region.nodes if n.target is not aten.sym_size.int]


# Split.


def test_split_gives_the_program_its_own_inputs_and_rope_for_the_text(llama: Decoder) -> None:
    program = llama.program(**FULL)
    nodes = [own_nodes(region) for region in program.regions]
    captured = program.inputs
    # The sizes that the captured RoPE tables took from the embeddings go with those.
    assert grown(program, passes.split_streams) == {
        "placeholder": 4,
        "take_tokens": 2,
        "sym_size.int": -2,
    }
    assert program.inputs == [
        *captured, "text_embeds", "text_columns", "column_position_ids", "column_is_vision",
    ]  # fmt: skip
    # RoPE is computed once, for all columns; the text takes its rows.
    assert program.rope_tables == dict(zip(program.rope_tables, ropes(program), strict=True))
    columns = program.placeholder_named("text_columns")
    rows = calls(program.graph, tokens.take_tokens)
    assert [n.args for n in rows] == [(table, columns) for table in program.rope_tables.values()]
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


def test_split_takes_masks_that_are_not_causal_from_a_table(mistral_window: Decoder) -> None:
    program = mistral_window.program(**FULL)
    assert grown(program, passes.split_streams, masks=("mask",))["take_mask"] == 1
    assert program.inputs[-1] == "column_mask"
    table = program.placeholder_named("column_mask")
    batch, one, rows, columns = table.meta["val"].shape
    assert (str(batch), one, str(rows)) == (str(program.batch), 1, str(columns))
    mask = only(calls(program.graph, tokens.take_mask))
    assert mask.args == (table, program.placeholder_named("text_columns"))
    assert all(region.attention.args[3] is mask for region in program.regions)


def test_split_of_decode_makes_a_stream_of_every_segment(llama: Decoder) -> None:
    program = llama.program("decode", **FULL)
    before = program.inputs
    assert grown(program, passes.split_streams) == {"sym_size.int": -2}
    assert program.history[-1].result.matched == 4
    assert program.inputs == before
    assert segments(program) == [("text", 0), ("inject_1", 1), ("prune_2", 2), ("exit_3", 3)]
    captured = {live_in: live_in for live_in in ropes(program)}
    assert all(s.live_ins == captured and s.columns is None for s in program.segments)


def test_split_of_decode_takes_ids_per_stream_where_positions_are_compact(llama: Decoder) -> None:
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


def test_split_refuses_an_input_of_the_layers_that_is_no_mask(llama: Decoder) -> None:
    captured = dataclasses.replace(llama.captured, masks=())
    with pytest.raises(
        PassError,
        match=r"^layers\.0 reads the input mask \(s\d+, 1, s\d+, s\d+\) \[mask\], which is neither a mask "
        r"nor made from position ids",
    ):
        llama.program(captured=captured, **FULL).apply(passes.split_streams)


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_a_side_input_that_depends_on_hidden_states_is_refused(llama: Decoder, kind: Kind) -> None:
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


def test_a_side_input_that_is_not_one_row_a_token_is_refused(llama: Decoder) -> None:
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


# Inject.


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_inject_merges_the_streams_at_one_layer(llama: Decoder, layer: int) -> None:
    program = llama.program_before(passes.inject, inject=layer)
    hidden, nodes = program.regions[layer].hidden, [own_nodes(r) for r in program.regions]
    inputs = program.inputs
    expected = {
        "placeholder": 3, "take_tokens": 2, "merge_index": 1, "merge_tokens": 1, "merge_columns": 1,
    }  # fmt: skip
    if layer == 0:
        # No layer sees the text alone, so what was gathered for it is dead.
        expected = total(expected, take_tokens=-2)
    assert grown(program, passes.inject) == expected
    assert program.inputs == [*inputs, "vision_embeds", "vision_columns", f"slots_inject_{layer}"]
    merged = only(calls(program.graph, tokens.merge_tokens))
    index = only(calls(program.graph, tokens.merge_index))
    assert merged.args == (hidden, program.placeholder_named("vision_embeds"), index)
    assert program.regions[layer].hidden is merged
    assert segments(program) == [("text", 0), (f"inject_{layer}", layer)]
    assert program.segments[-1].columns is only(calls(program.graph, tokens.merge_columns))
    assert [own_nodes(r) for r in program.regions] == nodes
    for region in program.regions:
        cos = next(iter(program.segment_of(region.layer).live_ins.values()))
        assert cos in tensor_inputs(region.nodes)


# Prune.


def test_prune_copies_one_query_and_gathers_the_keys(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, **FULL)
    region, inputs = program.regions[2], program.inputs
    hidden, key = region.hidden, region.attention.args[1]
    grown_by = grown(program, passes.prune)
    glue = {
        "find_columns": 2, "take_tokens": 6, "take_keys": 1, "attention_scores": 1,
        "surviving_columns": 1, "lookup": 0, "placeholder": 3,
    }  # fmt: skip
    assert {k: grown_by.get(k, 0) for k in glue} == glue
    # q and k are copied for the score; the survivors' k is gathered, so the layer's own is gone.
    assert grown_by["linear.default"] == 2 - 1
    assert key not in set(program.graph.nodes)
    assert program.inputs == [*inputs, "keep_2", "slots_prune_2", "query_columns"]
    assert segments(program)[-1] == ("prune_2", 2)

    scores = only(calls(program.graph, tokens.attention_scores))
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
    assert kept.args[0] is scores
    assert [str(a) for a in kept.args[2:]] == ["column_is_vision", "keep_2", "slots_prune_2"]
    assert rows.args == (hidden, places)
    assert survivors.args == (hidden, index)
    assert index.args == (inject.columns, kept)
    assert region.hidden is survivors
    assert program.segments[-1].columns is kept


def test_prune_leaves_the_other_layers_and_the_filter_layers_own_nodes_alone(
    llama: Decoder,
) -> None:
    program = llama.program_before(passes.prune, **FULL)
    nodes = [own_nodes(r) for r in program.regions]
    program.apply(passes.prune)
    for k, region in enumerate(program.regions):
        if k == 2:
            assert set(own_nodes(region)) < set(nodes[k])
        else:
            assert own_nodes(region) == nodes[k]


def test_prune_counts_every_copied_node(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, **FULL, positions="compact")
    glue = {
        "find_columns": 2, "take_tokens": 6, "attention_scores": 1, "surviving_columns": 1,
        "placeholder": 3,
    }  # fmt: skip
    # DecoderOutput, cos and sin of the survivors and of the query rows; copies of what makes the query and the
    # keys. Both rotate with tables that are unsqueezed within the layer.
    assert grown(program, passes.prune) == total(glue, PROJECT, PROJECT)


def test_prune_projects_the_survivors_keys_again_where_positions_are_compact(
    llama: Decoder,
) -> None:
    program = llama.program_before(passes.prune, **FULL, positions="compact")
    key = program.regions[2].attention.args[1]
    assert grown(program, passes.prune)["linear.default"] == 2
    assert program.regions[2].attention.args[1] is key
    assert not calls(program.graph, tokens.take_keys)


def test_what_makes_a_score_is_one_piece(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, **FULL)
    program.apply(passes.prune)
    assert set(program.subgraphs.values()) == {"score_2"}
    inside = set(program.subgraphs)
    assert only(calls(program.graph, tokens.attention_scores)) in inside
    assert sum(n.target is aten.linear.default for n in inside) == 2
    assert not inside & {n for r in program.regions for n in r.nodes}


def test_a_prune_is_one_piece_where_there_is_no_backward(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, "prefill", **FULL)
    before = set(program.graph.nodes)
    program.apply(passes.prune)
    added = {
        n
        for n in program.graph.nodes
        if n not in before and n.op not in ("placeholder", "get_attr")
    }
    inside = {n for n, name in program.subgraphs.items() if name == "prune_2"}
    assert calls(program.graph, tokens.surviving_columns)[0] in inside
    assert added == inside


def test_what_a_later_pass_puts_into_a_piece_belongs_to_it(llama: Decoder) -> None:
    program = llama.finished("prefill", **FULL, positions="compact")
    numbers = [
        n
        for n in calls(program.graph, tokens.renumber)
        if n.all_input_nodes[0] in program.subgraphs
    ]
    assert [program.subgraphs[n] for n in numbers] == ["prune_2"]


def test_what_two_passes_put_into_a_piece_belongs_to_it(llama: Decoder) -> None:
    """The first only reads it; only with the second is its node in between."""
    program = llama.finished("prefill", **FULL)

    def read(program: Program, plan: Any) -> PassResult:
        program.call(
            torch.neg, only(calls(program.graph, tokens.attention_scores)), before=chooser()
        )
        program.returns({**program.outputs, "negated": only(calls(program.graph, torch.neg))})
        return PassResult(matched=1)

    def feed(program: Program, plan: Any) -> PassResult:
        chooser().replace_input_with(chooser().args[0], only(calls(program.graph, torch.neg)))
        return PassResult(matched=1)

    def chooser() -> fx.Node:
        return only(calls(program.graph, tokens.surviving_columns))

    program.apply(read)
    negated = only(calls(program.graph, torch.neg))
    assert negated not in program.subgraphs
    program.apply(feed)
    assert program.subgraphs[negated] == "prune_2"


def test_random_scores_are_drawn_outside_what_is_compiled(llama: Decoder) -> None:
    program = llama.finished("prefill", **FULL, score="random")
    drawn = only(calls(program.graph, tokens.random_scores))
    assert drawn not in program.subgraphs
    assert set(program.subgraphs.values()) == {"prune_2"}


def test_every_filter_layer_scores_the_tokens_that_the_one_before_it_left(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, inject=0, prune={1: 5, 2: 2, 3: 1})
    assert program.apply(passes.prune).matched == 3
    assert program.inputs.count("query_columns") == 1
    assert [n for n in program.inputs if n.startswith(("keep", "slots_prune"))] == [
        "keep_1", "slots_prune_1", "keep_2", "slots_prune_2", "keep_3", "slots_prune_3",
    ]  # fmt: skip
    scores = calls(program.graph, tokens.attention_scores)
    assert [n.args[2] for n in scores] == [s.columns for s in program.segments[1:4]]
    assert segments(program)[2:] == [("prune_1", 1), ("prune_2", 2), ("prune_3", 3)]


def test_prune_at_the_layer_of_the_inject_scores_the_merged_tokens(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, inject=1, prune={1: 2})
    program.apply(passes.prune)
    merged = only(calls(program.graph, tokens.merge_tokens))
    taken = [n for n in merged.users if n.target is tokens.take_tokens]
    assert taken == [n for n in calls(program.graph, tokens.take_tokens) if n.args[0] is merged]
    assert len(taken) == 2


def test_a_schedule_without_filter_layers_prunes_nothing(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, inject=1)
    before = text(program.graph)
    result = program.apply(passes.prune)
    assert (result.matched, result.note) == (0, "the schedule prunes nowhere")
    assert text(program.graph) == before


def test_keys_that_are_not_made_from_one_token_each_cannot_score(llama: Decoder) -> None:
    program = llama.program_before(passes.prune, **FULL)
    region = program.regions[2]
    key = region.attention.args[1]
    assert isinstance(key, fx.Node)
    memory = program.add_input("memory", tuple(key.meta["val"].shape), torch.float32)
    mixed = program.call(torch.add, key, memory, before=region.attention)
    region.attention.replace_input_with(key, mixed)
    region.nodes.insert(region.nodes.index(region.attention), mixed)
    with pytest.raises(
        PassError,
        match=r"^cannot score at layers\.2: the queries or keys of attention_2 .*hidrop\.attention.* are "
        r"not made from one token each\. .* depends on memory \(.*\) \[memory\], and not only on add_",
    ):
        program.apply(passes.prune)


# Exit.


def test_exit_gathers_the_text(llama: Decoder) -> None:
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
def test_no_exit_and_an_exit_after_the_last_layer_do_nothing(
    llama: Decoder, layer: int | None
) -> None:
    program = llama.program_before(passes.exit_vision, **(FULL | {"exit": layer}))
    before = text(program.graph)
    result = program.apply(passes.exit_vision)
    assert (result.matched, result.note) == (0, "no layer after the exit")
    assert text(program.graph) == before
    assert segments(program)[-1] == ("prune_2", 2)


# Positions.


def test_persistent_positions_are_there_already(llama: Decoder) -> None:
    program = llama.program_before(passes.positions, **FULL)
    before = text(program.graph)
    assert program.apply(passes.positions).matched == 0
    assert text(program.graph) == before


def test_compact_renumbers_after_every_prune_and_exit(llama: Decoder) -> None:
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
    assert [n.args[0] for n in gathered[1]] == list(program.rope_tables.values())
    # The second filter layer's query rows have the ids that the first one gave.
    assert all(
        [user.target for user in row.users].count(tokens.take_tokens) == 1 for row in gathered[2]
    )


def test_compact_without_a_prune_or_an_exit_changes_nothing(llama: Decoder) -> None:
    program = llama.program_before(passes.positions, inject=1, positions="compact")
    before = text(program.graph)
    assert program.apply(passes.positions).matched == 0
    assert text(program.graph) == before


def test_group_renumbers_the_table_once_for_all(llama: Decoder) -> None:
    program = llama.program_before(passes.positions, **FULL, positions="group")
    table = program.placeholder_named("column_position_ids")
    readers = list(table.users)
    assert grown(program, passes.positions) == {"renumber_text": 1}
    renumbered = only(calls(program.graph, tokens.renumber_text))
    assert list(table.users) == [renumbered]
    assert list(renumbered.users) == readers
    assert [str(a) for a in renumbered.args] == ["column_position_ids", "column_is_vision"]


# Attention.


def test_attention_is_causal_without_a_mask(llama: Decoder) -> None:
    program = llama.program_before(passes.attention, **FULL)
    old = [region.attention for region in program.regions]
    arguments = [n.args for n in old]
    stacks = [n.meta["nn_module_stack"] for n in old]
    assert grown(program, passes.attention) == {"causal_attention": 4, "attention.default": -4}
    new = calls(program.graph, causal_attention)
    assert [region.attention for region in program.regions] == new
    assert [n.args for n in new] == [(*a[:3], *a[4:6]) for a in arguments]
    assert [n.meta["nn_module_stack"] for n in new] == stacks
    assert all(n in r.nodes for n, r in zip(new, program.regions, strict=True))
    assert program.history[-1].result.note == "0 layers with a mask"
    assert not program.placeholder_named("mask").users


def test_attention_reads_the_gathered_mask_of_its_stream(mistral_window: Decoder) -> None:
    program = mistral_window.program_before(passes.attention, masks=("mask",), **FULL)
    assert grown(program, passes.attention) == {"masked_attention": 4, "attention.default": -4}
    masks = [n.args[3] for n in calls(program.graph, masked_attention)]
    assert masks == calls(program.graph, tokens.take_mask)
    assert [n.args[1] for n in calls(program.graph, tokens.take_mask)] == [
        s.columns for s in program.segments
    ]
    assert program.history[-1].result.note == "4 layers with a mask"


def test_only_layers_with_a_window_read_a_mask(qwen_window: Decoder) -> None:
    masks = ("mask_sliding_attention",)
    program = qwen_window.program_before(passes.attention, masks=masks, **FULL)
    program.apply(passes.attention)
    targets = [region.attention.target for region in program.regions]
    assert targets == [causal_attention, masked_attention] * 2


# KV cache.


def test_prefill_writes_the_keys_and_values_that_its_attention_reads(llama: Decoder) -> None:
    program = llama.program_before(passes.kv_cache, "prefill", **FULL)
    inputs = program.inputs
    assert grown(program, passes.kv_cache) == {"placeholder": 8, "write_kv": 8}
    names = [f"{name}_{k}" for k in range(LAYERS) for name in ("keys", "values")]
    assert program.inputs == [*inputs, *names]
    writes = calls(program.graph, write_kv)
    assert program.effects == set(writes)
    read = [a for r in program.regions for a in r.attention.args[1:3]]
    assert sorted((str(n.args[0]), n.args[1]) for n in writes) == sorted(
        zip(names, read, strict=True)
    )
    for k in range(LAYERS):
        batch, heads, length, width = program.placeholder_named(f"keys_{k}").meta["val"].shape
        assert (str(batch), heads, width) == (str(program.batch), KV_HEADS, HEAD)
        assert str(length) == str(program.segment_of(k).length)


def test_writes_outlive_dead_code_removal(llama: Decoder) -> None:
    program = llama.finished("prefill", **FULL)
    assert len(calls(program.graph, write_kv)) == 8


def test_decode_attends_over_its_buffers(llama: Decoder) -> None:
    program = llama.program_before(passes.kv_cache, "decode", **FULL)
    inputs = program.inputs
    old = [region.attention.args for region in program.regions]
    assert grown(program, passes.kv_cache) == {
        "placeholder": 12, "cached_attention": 4, "attention.default": -4,
    }  # fmt: skip
    per_layer = zip(["text", "inject_1", "prune_2", "exit_3"], range(LAYERS), strict=True)
    names = [
        n for segment, k in per_layer for n in (f"slots_{segment}", f"keys_{k}", f"values_{k}")
    ]
    assert program.inputs == [*inputs, *names]
    for k, region in enumerate(program.regions):
        assert region.attention.target is cached_attention
        assert region.attention.args[:3] == old[k][:3]
        assert [str(a) for a in region.attention.args[3:6]] == [
            *names[3 * k + 1 : 3 * k + 3], names[3 * k],
        ]  # fmt: skip
        assert region.attention.args[6:] == (None, old[k][4])


def test_layers_of_one_stream_share_slots_and_mask(llama: Decoder) -> None:
    program = llama.program_before(passes.kv_cache, "decode", inject=1)
    inputs = program.inputs
    program.apply(passes.kv_cache, masked=True)
    added = program.inputs[len(inputs) :]
    assert [n for n in added if not n.startswith(("keys", "values"))] == [
        "slots_text", "mask_text", "slots_inject_1", "mask_inject_1",
    ]  # fmt: skip
    masks = [region.attention.args[6] for region in program.regions]
    inject = program.placeholder_named("mask_inject_1")
    assert masks == [program.placeholder_named("mask_text"), inject, inject, inject]


def test_a_stream_that_no_layer_sees_has_no_inputs_in_decode(llama: Decoder) -> None:
    program = llama.program_before(passes.kv_cache, "decode", inject=0, prune={0: 2})
    program.apply(passes.kv_cache)
    assert [n for n in program.inputs if n.startswith("slots")] == ["slots_prune_0"]


def test_layers_with_a_window_have_their_own_mask_in_decode(qwen_window: Decoder) -> None:
    program = qwen_window.program_before(passes.kv_cache, "decode", inject=2)
    program.apply(passes.kv_cache, masked=True)
    assert [n for n in program.inputs if n.startswith("mask_") and "attention" not in n] == [
        "mask_text", "mask_text_window_4", "mask_inject_2", "mask_inject_2_window_4",
    ]  # fmt: skip
    assert [str(region.attention.args[6]) for region in program.regions] == [
        "mask_text", "mask_text_window_4", "mask_inject_2", "mask_inject_2_window_4",
    ]  # fmt: skip


# Head.


def test_head_returns_all_rows_and_every_streams_columns(llama: Decoder) -> None:
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


def test_head_normalises_the_chosen_rows_only(llama: Decoder) -> None:
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


def test_head_of_decode_returns_the_new_rows_only(llama: Decoder) -> None:
    program = llama.program_before(passes.head, "decode", **FULL)
    assert grown(program, passes.head) == {"placeholder": -1}
    assert list(program.outputs) == ["hidden"]


# Programs.


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
def test_the_order_of_the_pipeline(kind: Kind, expected: list[str]) -> None:
    steps = pipeline._pipeline(kind, Variant(output="chosen", masks=("mask",), masked=True))
    assert [rewrite.__name__ for rewrite, _ in steps] == expected
    options = {rewrite.__name__: dict(given) for rewrite, given in steps if given}
    if kind == "decode":
        assert options == {"kv_cache": {"masked": True}}
    else:
        assert options == {"split_streams": {"masks": ("mask",)}, "head": {"chosen": True}}
    every = pipeline._pipeline(kind, Variant())
    assert all(not any(given.values()) for _, given in every)


def test_history_records_every_stage(llama: Decoder) -> None:
    program = llama.finished("prefill", "chosen", **FULL)
    assert [(s.name, dict(s.options), s.result.matched) for s in program.history] == [
        ("captured", {}, 4),
        ("split_streams", {"masks": ()}, 1),
        ("inject", {}, 1),
        ("prune", {}, 1),
        ("exit_vision", {}, 1),
        ("positions", {}, 0),
        ("attention", {}, 4),
        ("kv_cache", {}, 4),
        ("head", {"chosen": True}, 1),
    ]
    sizes = [len(s.graph.nodes) for s in program.history]
    # Each layer reads its batch and length off its own input, which the captured graph leaves to the first.
    assert sizes[0] == len(llama.captured.module.graph.nodes) + 2 * LAYERS
    assert sizes[-1] == len(program.graph.nodes)
    assert all(s.milliseconds > 0 for s in program.history[1:])


def test_a_stage_reads_as_python_with_the_names_of_the_functions(llama: Decoder) -> None:
    program = llama.finished(**FULL)
    codes = {s.name: s.code for s in program.history}
    assert "def forward(self, inputs_embeds, position_ids, mask)" in codes["captured"]
    assert "hidrop.attention" in codes["captured"]
    assert "merge_tokens(add_5, vision_embeds, merge_index)" in codes["inject"]
    assert "merge_tokens" not in codes["split_streams"]
    for name in ("attention_scores(", "surviving_columns(", "take_keys("):
        assert name in codes["prune"]
        assert name not in codes["inject"]
    assert "causal_attention(" in codes["attention"]
    assert "hidrop.attention" not in codes["attention"]
    title = str(program.history[3]).splitlines()[0]
    nodes = len(program.history[3].graph.nodes)
    assert title.startswith(f"# prune: 1 matched, {nodes} nodes, ")
    assert title.endswith("ms. filter layers [2]")
    assert str(program.history[-1]).startswith("# head chosen=False: 1 matched")


def test_the_capture_is_not_changed_by_its_programs(llama: Decoder) -> None:
    before = text(llama.captured.module.graph)
    for kind in ("train", "prefill", "decode"):
        llama.finished(kind, **FULL)
    assert text(llama.captured.module.graph) == before


def test_programs_read_the_models_own_parameters(llama: Decoder) -> None:
    program = llama.finished(**FULL)
    own = dict(llama.model.get_decoder().named_parameters())
    assert {
        n: p for n, p in program.module.named_parameters() if own[n] is p
    }.keys() == own.keys() - {"embed_tokens.weight"}


def test_a_layer_whose_hidden_states_nobody_reads_is_found(llama: Decoder) -> None:
    program = llama.program_before(passes.inject, **FULL)

    def skip_a_layer(program: Program, plan: Any, **options: Any) -> PassResult:
        program.regions[1].live_out.replace_all_uses_with(program.regions[0].live_out)
        return PassResult(matched=1)

    with pytest.raises(
        PassError, match=r"^after skip_a_layer, nothing reads the hidden states of layers\.1$"
    ):
        program.apply(skip_a_layer)
    assert [s.name for s in program.history] == ["captured", "split_streams"]


def test_a_layer_that_does_not_read_its_hidden_states_is_found(llama: Decoder) -> None:
    program = llama.program_before(passes.inject, **FULL)

    def forget_to_say_so(program: Program, plan: Any, **options: Any) -> PassResult:
        region = program.regions[2]
        doubled = program.call(torch.add, region.hidden, region.hidden, before=region.nodes[0])
        region.read(region.hidden, doubled)
        return PassResult(matched=1)

    with pytest.raises(
        PassError,
        match=r"^after forget_to_say_so, layers\.2 does not read add_\w+ \(.*\) \[aten\.add\.Tensor\] in "
        r"layers\.1",
    ):
        program.apply(forget_to_say_so)


def test_an_unknown_input_is_named_with_those_there_are(llama: Decoder) -> None:
    program = llama.program(**FULL)
    with pytest.raises(
        PassError,
        match=r"^the graph has no input 'keys_9'; it has inputs_embeds, position_ids, mask$",
    ):
        program.placeholder_named("keys_9")


# Lengths.


@pytest.mark.parametrize("kind", ["train", "prefill", "decode"])
@pytest.mark.parametrize("positions", ["persistent", "compact"])
def test_every_nodes_length_fits(llama: Decoder, kind: Kind, positions: str) -> None:
    schedule = Schedule(**FULL, positions=positions)
    program = build_program(
        llama.captured, plan(schedule, llama.model), kind, Variant(output="chosen")
    )
    check_lengths(program, every_node=True)


def test_every_nodes_length_fits_with_masks(qwen_window: Decoder) -> None:
    for kind in ("prefill", "decode"):
        program = build_program(
            qwen_window.captured, plan(Schedule(**FULL), qwen_window.model), kind,
            Variant(masks=("mask_sliding_attention",), masked=True),
        )  # fmt: skip
        check_lengths(program, every_node=True)


def test_a_layer_that_reads_the_wrong_stream_is_found(llama: Decoder) -> None:
    program = build_program(llama.captured, plan(Schedule(**FULL), llama.model), "train")
    region, whole = program.regions[3], program.regions[2].live_out
    region.read(region.hidden, whole)
    region.hidden = whole
    with pytest.raises(
        PassError,
        match=r"^layers\.3 should see the tokens of exit_3, but add_\w+ \(batch, prune_2, 32\) .* has those of prune_2$",
    ):
        check_lengths(program)


# Numerics.


def loop(
    decoder: Any, schedule: Schedule, embeds: Tensor, vision: list[int]
) -> tuple[Tensor, list[int]]:
    """The schedule, one sample, layer by layer; hidden states and columns of the last segment."""
    length = len(embeds)
    ids = torch.arange(length)
    if schedule.positions == "group":
        ids = ids - torch.tensor(
            [0 if c in vision else sum(v < c for v in vision) for c in range(length)]
        )
    hidden, columns, alive = embeds, list(range(length)), list(vision)
    for k, layer in enumerate(decoder.layers):
        before = columns
        if k == schedule.inject:
            old, hidden, columns = (
                dict(zip(columns, hidden, strict=True)),
                embeds,
                list(range(length)),
            )
            if k:
                hidden = torch.stack([old.get(c, embeds[c]) for c in columns])
        elif k == 0:
            columns = [c for c in columns if c not in vision]
            hidden = embeds[columns]
        if k in schedule.prune:
            scores = last_row(decoder, layer, hidden, ids[columns])
            by_score = sorted(alive, key=lambda c: (-scores[columns.index(c)], c))
            alive = sorted(by_score[: schedule.keep_counts(len(vision))[k]])
        if k == schedule.exit:
            alive = []
        if k in schedule.prune or k == schedule.exit:
            before, columns = columns, [c for c in columns if c not in vision or c in alive]
            hidden = hidden[[before.index(c) for c in columns]]
            if schedule.positions == "compact":
                ids = ids.clone()
                ids[columns] = torch.arange(len(columns))
        rope = decoder.rotary_emb(hidden[None], ids[columns][None])
        hidden = layer(hidden[None], position_embeddings=rope, attention_mask=None)[0]
    return decoder.norm(hidden), columns


def last_row(decoder: Any, layer: Any, hidden: Tensor, ids: Tensor) -> list[float]:
    """Mean over heads of the last token's attention."""
    normed, attention = layer.input_layernorm(hidden[None]), layer.self_attn
    query, key = (
        project(normed).view(1, len(hidden), -1, HEAD).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(hidden[None], ids[None]))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    weights = (query[:, :, -1:] @ key.transpose(2, 3) * attention.scaling).softmax(dim=-1)
    return list(weights.mean(dim=1)[0, 0].tolist())


def layout_and_tensors(
    schedule: Schedule, rows: list[str], embeds: Tensor
) -> tuple[Layout, dict[str, Tensor]]:
    """Rows of "t", "v" and "." laid out, and the program inputs of train and prefill."""
    valid = torch.tensor([[c != "." for c in row] for row in rows])
    first = torch.tensor([row.index("t") if row[0] != "v" else 0 for row in rows])
    layout = lay_out(
        schedule,
        LAYERS,
        valid=valid,
        placeholder=torch.tensor([[c == "v" for c in row] for row in rows]),
        position_ids=(torch.arange(len(rows[0]))[None] - first[:, None]).clamp(min=0),
        images=[1] * len(rows),
    )
    tensors = dict(layout.inputs)
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 1))
    for name in ("text", "vision"):
        tensors[f"{name}_embeds"] = tokens.take_tokens(padded, tensors[f"{name}_columns"])
    return layout, tensors


def run(program: Program, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs: dict[str, Tensor] = program.module(*[tensors[name] for name in program.inputs])
    return outputs


ROWS = ["ttvvvvvttt", "..tvvvvvtt"]


@pytest.mark.parametrize("positions", ["persistent", "compact", "group"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inject": 2},
        {"prune": {0: 3, 2: 1}},
        {"inject": 1, "prune": {1: 4, 2: 2}, "exit": 3},
        {"inject": 3, "exit": 4},
    ],
    ids=["identity", "inject", "prune", "all", "late"],
)
def test_a_train_program_equals_the_layers_in_a_loop(
    llama: Decoder, options: dict[str, Any], positions: str
) -> None:
    schedule = Schedule(**options, positions=positions)
    program = llama.finished(**options, positions=positions)
    embeds = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    _, tensors = layout_and_tensors(schedule, ROWS, embeds)
    outputs = run(program, tensors)
    for b, row in enumerate(ROWS):
        start = len(row) - len(row.lstrip("."))
        vision = [i - start for i, c in enumerate(row) if c == "v"]
        with torch.no_grad():
            hidden, columns = loop(llama.model.get_decoder(), schedule, embeds[b, start:], vision)
        found = outputs[f"columns_{program.segments[-1].name}"][b].tolist()
        assert found[: len(columns)] == [c + start for c in columns]
        assert set(found[len(columns) :]) <= {len(row)}
        torch.testing.assert_close(
            outputs["hidden"][b, : len(columns)], hidden, rtol=1e-4, atol=1e-4
        )


def buffers(layout: Layout, program: Program, batch: int, room: int) -> dict[str, Tensor]:
    return {
        f"{name}_{k}": torch.zeros(
            batch, KV_HEADS, layout.lengths[program.segment_of(k).name] + room, HEAD
        )
        for k in range(LAYERS)
        for name in ("keys", "values")
    }


def filled(
    buffers: dict[str, Tensor], layout: Layout, program: Program, fresh: int
) -> dict[str, Tensor]:
    return {
        name: buffer[
            :, :, : layout.lengths[program.segment_of(int(name.split("_")[1])).name] + fresh
        ]
        for name, buffer in buffers.items()
    }


def test_prefill_returns_the_chosen_rows_of_train(llama: Decoder) -> None:
    schedule = Schedule(**FULL)
    train, prefill = llama.finished(**FULL), llama.finished("prefill", "chosen", **FULL)
    embeds = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    layout, tensors = layout_and_tensors(schedule, ROWS, embeds)
    cache = buffers(layout, prefill, 2, 0)
    all_rows = run(train, tensors)
    chosen = run(prefill, tensors | cache)
    assert chosen["hidden"].shape == (2, 1, WIDTH)
    for b in range(2):
        place = all_rows["columns_exit_3"][b].tolist().index(layout.last[b])
        torch.testing.assert_close(chosen["hidden"][b, 0], all_rows["hidden"][b, place])
    assert all(buffer.abs().sum() > 0 for buffer in cache.values())


def test_decode_after_prefill_equals_the_decoder_on_the_longer_row(llama: Decoder) -> None:
    schedule = Schedule()
    prefill, decode = llama.finished("prefill"), llama.finished("decode")
    embeds = torch.randn(1, 11, WIDTH, generator=torch.Generator().manual_seed(1))
    layout, tensors = layout_and_tensors(schedule, ["ttvvvvvttt"], embeds[:, :10])
    cache = buffers(layout, prefill, 1, 1)
    run(prefill, tensors | filled(cache, layout, prefill, 0))
    inputs = filled(cache, layout, decode, 1) | {
        "inputs_embeds": embeds[:, 10:],
        "position_ids": torch.tensor([[10]]),
        "slots_inject_0": torch.tensor([10]),
    }
    hidden = run(decode, inputs)["hidden"]
    with torch.no_grad():
        expected = llama.model.get_decoder()(inputs_embeds=embeds).last_hidden_state[:, -1:]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_no_marker_of_capture_is_left_in_a_finished_program(llama: Decoder) -> None:
    for kind in ("train", "prefill", "decode"):
        program = llama.finished(kind, **FULL)
        assert not calls(program.graph, CAPTURED_ATTENTION)
