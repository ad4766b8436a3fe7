"""Counts and lookups in graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.program.program import Program

aten = torch.ops.aten


def counted(graph: fx.Graph) -> Counter[str]:
    """Count nodes by target; inputs and parameters by kind."""
    return Counter(
        getattr(n.target, "__name__", str(n.target)) if n.op == "call_function" else n.op
        for n in graph.nodes
    )


def grown(program: Program, rewrite: Any, **options: Any) -> dict[str, int]:
    """Apply a pass; return how many nodes of each kind there are more (or fewer, below 0)."""
    before = counted(program.graph)
    program.apply(rewrite, **options)
    after = counted(program.graph)
    return {k: after[k] - before[k] for k in before | after if after[k] != before[k]}


def total(*parts: dict[str, int], **more: int) -> dict[str, int]:
    """Add counts; those that come to 0 are left out."""
    together: Counter[str] = Counter()
    for part in (*parts, more):
        together.update(part)
    return {k: n for k, n in together.items() if n}


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """List the calls of a function in graph order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is target]


def only(nodes: list[fx.Node]) -> fx.Node:
    """Return the one node of a list; more or fewer is an error."""
    (node,) = nodes
    return node


def segments(program: Program) -> list[tuple[str, int]]:
    """List the segments as (name, first layer)."""
    return [(s.name, s.start) for s in program.segments]


def ropes(program: Program) -> list[fx.Node]:
    """List every cos and sin as handed to layers or gathered from, in graph order."""
    made = {*calls(program.graph, aten.cos.default), *calls(program.graph, aten.sin.default)}
    return [scaled_and_cast(node) for node in sorted(made)]


def scaled_and_cast(node: fx.Node) -> fx.Node:
    """Return the last of the chain of single users that is still a part of RoPE."""
    while (user := next(iter(node.users))).target in (aten.mul.Tensor, aten.to.dtype):
        if len(user.all_input_nodes) > 1:
            break
        node = user
    return node


def own_nodes(region: Region) -> list[fx.Node]:
    """List a region's nodes but the sizes that it reads."""
    return [n for n in region.nodes if n.target is not aten.sym_size.int]
