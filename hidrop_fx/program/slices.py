"""Copies of a part of a program's graph, computed for other tokens.

copies = copy_slice(program, [query], {hidden: pruned}, before=node, subgraph=None)     # copies[query]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from hidrop_fx.errors import PassError
from hidrop_fx.program.entry import backward

if TYPE_CHECKING:
    from hidrop_fx.program.program import Program

_SIZE = torch.ops.aten.sym_size.int


def copy_slice(
    program: Program,
    wanted: list[fx.Node],
    given: Mapping[fx.Node, fx.Node],
    before: fx.Node,
    subgraph: str | None,
) -> dict[fx.Node, fx.Node]:
    """Copy what computes `wanted` from the nodes `given`, see `Program.copy_slice`."""
    copies: dict[fx.Node, fx.Node] = dict(given)
    sizes = _sizes_at_hand(program.graph, given)
    nodes = backward(wanted, {*given, *sizes})
    read = {n for node in nodes for n in node.all_input_nodes}
    for node, (source, dim) in sizes.items():
        if node in read:
            with program.graph.inserting_before(before):
                copies[node] = program.graph.call_function(_SIZE, (given[source], dim))
            copies[node].meta["val"] = node.meta["val"]
    for node in nodes:
        if node.op == "get_attr":
            copies[node] = node
            continue
        if node.op == "placeholder":
            raise PassError(
                f"{', '.join(map(program.describe, wanted))} depends on {program.describe(node)}, and not only "
                f"on {', '.join(map(program.describe, given))}; it cannot be computed for other tokens"
            )
        with program.graph.inserting_before(before):
            copies[node] = program.graph.node_copy(node, copies.__getitem__)
        if subgraph is not None:
            program.subgraphs[copies[node]] = subgraph
    return copies


def _sizes_at_hand(
    graph: fx.Graph, given: Collection[fx.Node]
) -> dict[fx.Node, tuple[fx.Node, int]]:
    """Return sizes that were captured off another input, each with the given node and the dim that have it too."""
    found = {}
    for node in graph.nodes:
        if node.target is not _SIZE:
            continue
        source, dim = node.args
        if source.op != "placeholder" or source in given:
            continue
        size = str(source.meta["val"].shape[dim])
        dims = [
            (other, place)
            for other in given
            for place, length in enumerate(getattr(other.meta.get("val"), "shape", ()))
            if str(length) == size
        ]
        if dims:
            found[node] = dims[0]
    return found
