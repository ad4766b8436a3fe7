"""Nodes for the parameters of a score function, by name: the filter layer's attention, or the layer before's.

    given = score_inputs(scorer, program, region, segment, subgraphs)
    program.call(scorer.function, *(given[name] for name in scorer.parameters), ...)

What a layer's attention reads is made by copies of that layer's own nodes, on the tokens before the prune. The layer
before is copied too, not read: a layer's body hands on one tensor, its hidden states.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.errors import PassError
from hidrop_fx.methods import Scorer
from hidrop_fx.methods.scoring import PROMPT
from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention import CapturedArguments
from hidrop_fx.ops.behind import last_present
from hidrop_fx.ops.cache_cut import real_tokens
from hidrop_fx.ops.text_raters import text_raters
from hidrop_fx.passes.branch import branch_reads
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.program import Program, SegmentNodes

# One object, since every filter layer declares it.
_QUERY_COLUMNS = InputSpec(
    "query_columns", ("batch", "queries"), torch.int64, lambda call: call.layout.query_columns
)
_PREVIOUS, _TWIG = "previous_", "twig_"
_ROTATIONS = {"cos": torch.ops.aten.cos.default, "sin": torch.ops.aten.sin.default}


@dataclass(frozen=True, kw_only=True)
class Subgraphs:
    """Names of the subgraphs of a score, each compiled as one."""

    score: str
    keys: str
    """Of what reads every token's state: keys and values."""
    move: str | None
    """Of what gathers query rows; None where it runs as it is."""


def score_inputs(
    scorer: Scorer,
    program: Program,
    region: Region,
    segment: SegmentNodes,
    subgraphs: Subgraphs,
    also: Collection[str] = (),
) -> dict[str, Any]:
    """Make the nodes for the parameters of a score function, by name.

    Args:
        also: further names that are wanted.
    """
    before = region.nodes[0]
    assert segment.columns is not None
    given: dict[str, Any] = {"columns": segment.columns, "hidden": region.hidden}
    wanted = {*scorer.parameters, *scorer.optional, *also}
    if "is_vision" in wanted:
        table = program.placeholder_named("column_is_vision")
        look_up = partial(program.call, before=before, subgraph=subgraphs.move)
        given["is_vision"] = look_up(tokens.lookup, table, segment.columns)
    if "is_real" in wanted:
        table = program.placeholder_named("column_is_vision")
        compare = partial(program.call, before=before, subgraph=subgraphs.move)
        given["is_real"] = compare(real_tokens, segment.columns, table)
    places = None
    if wanted & {"query", "query_columns", "previous_query", "twig_query", "raters"}:
        given["query_columns"] = _query_columns(program, segment, before, subgraphs.move)
    if wanted & {"query", "previous_query", "twig_query"}:
        find = partial(program.call, before=before, subgraph=subgraphs.move)
        places = find(tokens.find_columns, segment.columns, given["query_columns"])
    reads = _AttentionReads(
        program=program, segment=segment, places=places, before=before, subgraphs=subgraphs
    )
    given |= reads.of(region, wanted)
    given |= _rotations(program, region, segment, wanted)
    if "raters" in wanted:
        given["raters"] = _raters(program, given["query_columns"])
    if any(name.startswith(_PREVIOUS) for name in wanted):
        last = program.regions[region.layer - 1]
        names = {n.removeprefix(_PREVIOUS) for n in wanted if n.startswith(_PREVIOUS)}
        of_last = reads.of(last, names) | _rotations(program, last, segment, names)
        given |= {f"{_PREVIOUS}{name}": node for name, node in of_last.items()}
        given[f"{_PREVIOUS}hidden"] = last.hidden
    of_twig = {n.removeprefix(_TWIG) for n in wanted if n.startswith(_TWIG)}
    if of_twig:
        take = partial(_taken, program, places, before, subgraphs.move)
        read = branch_reads(program, region, segment, take, subgraphs.score, of_twig)
        given |= {f"{_TWIG}{name}": node for name, node in read.items()}
    return given


def _query_columns(
    program: Program, segment: SegmentNodes, before: fx.Node, subgraph: str | None
) -> fx.Node:
    """Return the columns of the rows that score; of images' own tokens the last that are there."""
    wanted = program.add_input(_QUERY_COLUMNS)
    if program.plan.schedule.scoring == PROMPT:
        return wanted
    table = program.placeholder_named("column_is_vision")
    return program.call(
        last_present, segment.columns, wanted, table, before=before, subgraph=subgraph
    )


def _taken(
    program: Program, places: fx.Node | None, before: fx.Node, subgraph: str | None, node: fx.Node
) -> fx.Node:
    return program.call(tokens.take_tokens, node, places, before=before, subgraph=subgraph)


def _raters(program: Program, query_columns: fx.Node) -> fx.Node:
    """Return the share of each query row in a score by its embedding, computed once for all filter layers."""
    for node in program.graph.nodes:
        if node.target is text_raters:
            return node
    before = program.regions[0].nodes[0]
    names = ("text_embeds", "text_columns", "vision_embeds", "vision_columns", "column_is_vision")
    text, text_columns, vision, vision_columns, table = map(program.placeholder_named, names)
    entering = [program.entry.insert(each, program.graph, before=before) for each in (text, vision)]
    given = (entering[0], text_columns, entering[1], vision_columns, query_columns, table)
    return program.call(text_raters, *given, before=before)


def _rotations(
    program: Program, region: Region, segment: SegmentNodes, wanted: Collection[str]
) -> dict[str, fx.Node]:
    """Return RoPE's cosines and sines [B, S, d] at the tokens before the prune, as far as they are wanted."""
    found = {}
    for name in sorted(wanted & _ROTATIONS.keys()):
        tables = [
            live_in
            for live_in, table in program.tables.rope.items()
            if live_in in region.live_ins
            and [n for n in _ROTATIONS if _comes_from(table, n)] == [name]
        ]
        if len(tables) != 1:
            raise PassError(
                f"cannot score at {region.path}: it reads {len(tables)} tables of RoPE that are a {name} alone, and the "
                f"score asks for one"
            )
        found[name] = segment.live_ins[tables[0]]
    return found


def _comes_from(table: fx.Node, name: str) -> bool:
    """Return True if a table was made by that function, and only moved, scaled and cast since."""
    pending, seen = [table], set()
    while pending:
        node = pending.pop()
        if node.target is _ROTATIONS[name]:
            return True
        if node.target in _ROTATIONS.values() or node in seen:
            continue
        seen.add(node)
        pending += node.all_input_nodes
    return False


@dataclass(frozen=True, kw_only=True)
class _AttentionReads:
    """What attentions read, computed at one place of the graph on the tokens of one segment."""

    program: Program
    segment: SegmentNodes
    places: fx.Node | None
    """Of the query rows among the tokens, where a score asks for queries."""
    before: fx.Node
    subgraphs: Subgraphs

    def of(self, region: Region, wanted: Collection[str]) -> dict[str, Any]:
        """Make the nodes of one layer's attention for the names that are wanted."""
        found: dict[str, Any] = {}
        if region.attends:
            captured = CapturedArguments.of(region.attention)
            found = {
                "scale": captured.scale,
                "softcap": captured.softcap,
                "sinks": captured.sinks,
            }
        for name, node in (("key", key_of(region)), ("value", value_of(region))):
            if name in wanted:
                found[name] = self._copied(
                    region, node, _read_from_outside(region), self.subgraphs.keys
                )
        if "query" in wanted:
            found["query"] = self._copied(
                region, _query_of(region), self._query_rows(region), self.subgraphs.score
            )
        return found

    def _query_rows(self, region: Region) -> dict[fx.Node, fx.Node]:
        """Gather the query rows of what a layer reads."""
        take = partial(self.program.call, before=self.before, subgraph=self.subgraphs.move)
        read = [region.hidden, *(self.segment.live_ins[each] for each in self.program.tables.rope)]
        return {node: take(tokens.take_tokens, node, self.places) for node in read}

    def _copied(
        self, region: Region, node: fx.Node, given: dict[fx.Node, fx.Node], subgraph: str
    ) -> fx.Node:
        try:
            copies = self.program.copy_slice([node], given, before=self.before, subgraph=subgraph)
        except PassError as error:
            raise PassError(
                f"cannot score at {region.path}: the queries or keys of "
                f"{self.program.describe(region.attention)} are not made from one token each. {error}"
            ) from error
        return copies[node]


def _read_from_outside(region: Region) -> dict[fx.Node, fx.Node]:
    """Return what a layer's nodes read and do not compute, parameters aside, each standing for itself.

    They come in graph order: where two have a size at hand, every process takes the same one.
    """
    inside = set(region.nodes)
    read = {node for each in region.nodes for node in each.all_input_nodes} - inside
    return {node: node for node in sorted(read) if node.op not in ("get_attr", "placeholder")} | {
        region.hidden: region.hidden,
        **{node: node for node in region.live_ins.values()},
    }


def _query_of(region: Region) -> fx.Node:
    return _operand(region, 0)


def key_of(region: Region) -> fx.Node:
    """Return the keys that a layer's attention reads."""
    return _operand(region, 1)


def value_of(region: Region) -> fx.Node:
    """Return the values that a layer's attention reads."""
    return _operand(region, 2)


def _operand(region: Region, place: int) -> fx.Node:
    node = region.attention.args[place]
    assert isinstance(node, fx.Node)
    return node
