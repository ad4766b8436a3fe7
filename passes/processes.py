"""Scores where processes divide the heads of a decoder: the same in each of them, so that all choose the same tokens.

    scores = sum(scores of each process) / processes         # one number a token, where a score is a mean over heads
    keys   = cat(keys of each process)                       # of all heads, where it is another function of them

Before:  %scores = attention_scores(%query, %key, ...)              # of this process's heads
After:   %scores = attention_scores(%query, %key, ...) ; %mean = mean_of_processes(%scores, group, 2)
or:      %all = gather(%key, 1, 0, 8, group) ; %scores = value_similarity(%all, ...)
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.capture.tensor_parallel import divided_nodes
from hidrop_fx.methods import Scorer
from hidrop_fx.ops.tensor_parallel import enter, gather, mean_of_processes, of_first_process
from hidrop_fx.program.program import Program

Call = Callable[..., fx.Node]
"""`Program.call` at one place of the graph."""


def is_divided(program: Program, node: Any) -> bool:
    """Return True for a node of which each process computes its own heads or channels."""
    processes = program.captured.processes
    if processes is None or not isinstance(node, fx.Node):
        return False
    return node in divided_nodes(program.graph, processes.divided)


def processes_of(program: Program, region: Region) -> int:
    """Return among how many processes the heads of a layer are divided; 1 where each has all."""
    processes = program.captured.processes
    divided = processes is not None and is_divided(program, region.attention.args[1])
    return processes.size if processes is not None and divided else 1


def all_heads(program: Program, call: Call, node: fx.Node) -> fx.Node:
    """Return queries, keys or values [B, H, S, d] of all heads; the node itself where it has them."""
    processes = program.captured.processes
    if processes is None or not is_divided(program, node):
        return node
    heads = node.meta["val"].shape[1]
    before, behind = processes.rank * heads, (processes.size - 1 - processes.rank) * heads
    return call(gather, node, 1, before, behind, processes.group)


def scored_alike(
    program: Program, call: Call, scorer: Scorer, arguments: Sequence[Any]
) -> tuple[fx.Node, fx.Node]:
    """Call a score function.

    Returns:
        The call, and scores fp32 [B, S] that are the same in every process.
    """
    processes = program.captured.processes
    if processes is None:
        scores = call(scorer.function, *arguments)
        return scores, scores
    divided = any(is_divided(program, node) for node in arguments)
    if divided and not scorer.averages_heads:
        arguments = [all_heads(program, call, node) for node in arguments]
    made = scores = call(scorer.function, *arguments)
    if divided and scorer.averages_heads:
        scores = call(mean_of_processes, scores, processes.group, processes.size)
    if not scorer.deterministic:
        scores = call(of_first_process, scores, processes.group)
    return made, scores


def entering_heads(program: Program, node: fx.Node, values: fx.Node, before: fx.Node) -> fx.Node:
    """Return what is to be multiplied with values of heads, with the gradient that all heads give it."""
    processes = program.captured.processes
    if processes is None or not is_divided(program, values):
        return node
    return program.call(enter, node, processes.group, before=before)
