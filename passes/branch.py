"""A side branch: copies of the layers of another capture, on the tokens before a prune.

    states = hidden                                          # of every token, at the filter layer's input
    for layer in twig[:-1]: states = layer(states)
    keys   = rope(k_proj(norm(states)))                      # the last layer: no values, no MLP,
    query  = rope(q_proj(norm(states[query_places])))        # and queries of the rows that score alone

Before:  %add_13 = layers.1(...)
After:   %add_13 = layers.1(...)
         %twig_add = twig.0(%add_13, %cos_2, %sin_2) ; %twig_add_1 = twig.1(%twig_add, %cos_2, %sin_2)
         %keys = twig.2.k(%twig_add_1) ; %rows = twig.2.q(take_tokens(%twig_add_1, %places))

The layers were captured with parameters of their own, as those of the decoder. They keep nothing: no cache holds what
they attend to. Their attention is replaced with that of the decoder's layers, by the same pass.
"""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.regions import Region, find_regions
from hidrop_fx.errors import PassError
from hidrop_fx.ops.attention import CapturedArguments
from hidrop_fx.program.entry import backward
from hidrop_fx.program.program import Branch, Program, SegmentNodes

PREFIX = "twig__"


def parameter_name(path: str) -> str:
    """Name a parameter of a branch among those of a program, by its path in the branch's decoder."""
    return f"{PREFIX}{path.replace('.', '__')}"


Take = Callable[[fx.Node], fx.Node]
"""Gather the query rows of what a layer reads."""


def branch_reads(
    program: Program,
    region: Region,
    segment: SegmentNodes,
    take: Take,
    subgraph: str,
    wanted: Collection[str],
) -> dict[str, Any]:
    """Run a side branch on the input of a filter layer, and make the nodes of its last layer's attention that are wanted.

    Args:
        region: the filter layer.
        segment: the tokens before the prune.
        take: gathers the query rows.
        subgraph: of what is computed of the last layer.

    Raises:
        PassError: no side branch was captured, or its layers read what the decoder's do not.
    """
    captured = program.captured_branch
    if captured is None:
        raise PassError(
            f"the score at {region.path} reads a side branch, and none was captured; compile with modules={{'twig': ...}}"
        )
    traced = captured.module.graph, captured.layers, captured.num_layers
    *layers, last = find_regions(*traced, captured.tokenwise)
    if not last.attends:
        kind = "recurrent" if last.is_recurrent else "a convolution or an MLP"
        raise PassError(
            f"the score at {region.path} reads the attention of the side branch's last layer, and that is {kind}: let it "
            "end with a layer that attends"
        )
    copier = _Copier(program, captured, region, segment)
    states = region.hidden
    for layer in layers:
        states = copier.layer(layer, states)
    read = CapturedArguments.of(last.attention)
    found: dict[str, Any] = {"scale": read.scale, "softcap": read.softcap, "sinks": None}
    if isinstance(read.sinks, fx.Node):
        found["sinks"] = copier.parameter(read.sinks)
    given = {last.hidden: states, **copier.shared(last)}
    if "key" in wanted:
        found["key"] = copier.computed(read.key, given, subgraph)
    if "query" in wanted:
        rows = {node: take(value) for node, value in given.items()}
        found["query"] = copier.computed(read.query, rows, subgraph)
    return found


class _Copier:
    """Copies nodes of a captured branch into a program, before one of its layers."""

    def __init__(
        self, program: Program, captured: CapturedDecoder, region: Region, segment: SegmentNodes
    ) -> None:
        self._program, self._captured, self._filter = program, captured, region
        self._segment, self._before = segment, region.nodes[0]
        self._branch = Branch(segment=segment, regions=[])
        program.branches.append(self._branch)
        self._parameters: dict[fx.Node, fx.Node] = {}
        own = program.captured.module
        self._rope = {_digest(n, own): value for n, value in _originals(program, segment).items()}

    def layer(self, layer: Region, hidden: fx.Node) -> fx.Node:
        """Copy a whole layer, and return its hidden states [B, S, D]."""
        shared = self.shared(layer)
        masks = {
            live_in: self._mask(live_in) for live_in in layer.live_ins if live_in not in shared
        }
        copies = {layer.hidden: hidden, **shared, **masks}
        nodes = [node for node in layer.nodes if node.op != "get_attr"]
        name = f"twig_{sum(len(branch.regions) for branch in self._program.branches)}"
        made = [self._copy(node, copies, name) for node in nodes]
        live_ins = {self._placeholder(old): new for old, new in masks.items()}
        self._branch.regions.append(
            Region(
                layer=self._filter.layer,
                path=f"twig.{layer.layer}",
                nodes=made,
                hidden=hidden,
                live_ins=live_ins,
                live_out=copies[layer.live_out],
                attention=copies[layer.attention],
                kv_shape=layer.kv_shape,
                is_convolution=layer.is_convolution,
                is_tokenwise=layer.is_tokenwise,
                convolution=None if layer.convolution is None else copies[layer.convolution],
                recurrence=None if layer.recurrence is None else copies[layer.recurrence],
                state_shape=layer.state_shape,
            )
        )
        return copies[layer.live_out]

    def shared(self, layer: Region) -> dict[fx.Node, fx.Node]:
        """Return RoPE's tables, which a layer reads, as they are for the segment's tokens.

        Raises:
            PassError: it reads something else than the decoder's own layers do.
        """
        found = {}
        for live_in in layer.live_ins:
            if live_in.op == "placeholder":
                continue
            value = self._rope.get(_digest(live_in, self._captured.module))
            if value is None:
                raise PassError(
                    f"layer {layer.layer} of the side branch reads {live_in.name}, which no layer of the decoder reads: it "
                    "cannot be had for the tokens of a segment. Make the branch with hidrop_fx.grow_twig(model)"
                )
            found[live_in] = value
        return found

    def computed(self, wanted: fx.Node, given: dict[fx.Node, fx.Node], subgraph: str) -> fx.Node:
        """Copy what computes one node from others."""
        copies = dict(given)
        for node in backward([wanted], given):
            if node.op == "placeholder":
                raise PassError(
                    f"cannot score by the side branch: {wanted.name} depends on {node.name}, and not on one token alone"
                )
            if node.op != "get_attr":
                self._copy(node, copies, subgraph)
        return copies[wanted]

    def parameter(self, node: fx.Node) -> fx.Node:
        """Return the node of a parameter of the branch."""
        if node not in self._parameters:
            name = str(node.target)
            tensor: Tensor = operator.attrgetter(name)(self._captured.module)
            self._parameters[node] = self._program.add_parameter(parameter_name(name), tensor)
        return self._parameters[node]

    def _copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node], subgraph: str) -> fx.Node:
        def replaced(read: fx.Node) -> fx.Node:
            return self.parameter(read) if read.op == "get_attr" else copies[read]

        with self._program.graph.inserting_before(self._before):
            made = self._program.graph.node_copy(node, replaced)
        stack = made.meta.get("nn_module_stack") or {}
        made.meta["nn_module_stack"] = {
            key: (f"twig{path.rpartition(self._captured.layers)[2]}", kind)
            for key, (path, kind) in stack.items()
            if self._captured.layers in path
        }
        self._program.subgraphs[made] = subgraph
        copies[node] = made
        return made

    def _mask(self, live_in: fx.Node) -> fx.Node:
        """Return the mask of the segment's tokens, or the captured one where that is plain causal."""
        own = self._placeholder(live_in)
        return self._segment.live_ins.get(own, own)

    def _placeholder(self, live_in: fx.Node) -> fx.Node:
        return self._program.placeholder_named(live_in.name)


def _originals(program: Program, segment: SegmentNodes) -> dict[fx.Node, fx.Node]:
    """Return RoPE's nodes of the captured decoder -> their values for a segment's tokens."""
    graph = program.captured.module.graph
    names = {node.name: node for node in graph.nodes}
    return {names[known.name]: segment.live_ins[known] for known in program.tables.rope}


def _digest(node: fx.Node, module: fx.GraphModule) -> Any:
    """Describe how a node is computed; equal for nodes of two captures that compute the same."""
    known: dict[fx.Node, Any] = {}

    def described(node: fx.Node) -> Any:
        if node not in known:
            if node.op == "placeholder":
                known[node] = node.name
            elif node.op == "get_attr":
                known[node] = _identity(operator.attrgetter(str(node.target))(module))
            else:
                args = fx.map_arg((node.args, node.kwargs), lambda n: _Described(described(n)))
                known[node] = f"{node.target}{args}"
        return known[node]

    return described(node)


class _Described(str):
    """A node's description, in the place of the node among arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"({self})"


def _identity(tensor: Tensor) -> str:
    """Name a tensor: a constant of the trace by its values, which each trace has its own of, and any other by itself."""
    if tensor.numel() <= 1 and not isinstance(tensor, torch.nn.Parameter):
        return f"{tensor.dtype} {tensor.tolist()}"
    return f"tensor {id(tensor)}"
