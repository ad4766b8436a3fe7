"""Find the nodes of each decoder layer in a captured graph.

A *region* is the set of nodes whose `nn_module_stack` names one decoder layer. Its *live-ins* are
the values it reads from outside, parameters aside: the hidden states, and the *live_ins*, which every
layer shares (RoPE's cos and sin, a mask). Its one *live-out* is the next layer's hidden states.
Nothing is recognised by shape or width.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from hidrop_fx.errors import CaptureError
from hidrop_fx.ops.attention import CAPTURED_ATTENTION

_SIZE = torch.ops.aten.sym_size.int


@dataclass(kw_only=True)
class Region:
    """One decoder layer of a graph; passes keep its fields true to the graph as they rewrite it."""

    layer: int
    path: str
    """Module path, e.g. "layers.3"."""
    nodes: list[fx.Node]
    hidden: fx.Node
    """The hidden states it reads."""
    live_ins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Captured live_in live-in -> the node that stands for it in the layer's stream."""
    live_out: fx.Node
    attention: fx.Node

    def read(self, old: fx.Node, new: fx.Node) -> None:
        """Make the nodes of this region, and only they, read `new` in place of `old`."""
        for node in self.nodes:
            node.replace_input_with(old, new)


def find_regions(graph: fx.Graph, layers: str, num_layers: int) -> list[Region]:
    """Regions of all decoder layers, in order, with the sizes they use read off their own input.

    Raises:
        CaptureError: a layer is missing, or does not have the shape described above; the message
            names the node, its module path and its shape.
    """
    members = _members(graph, layers)
    missing = [k for k in range(num_layers) if k not in members]
    if missing:
        raise CaptureError(
            f"the captured graph holds no node of {layers}.{missing[0]} ({len(members)} of "
            f"{num_layers} layers found); a layer that is skipped or rewritten by hooks cannot be "
            "compiled"
        )
    regions: list[Region] = []
    for layer in range(num_layers):
        incoming = regions[-1].live_out if regions else None
        regions.append(_region(graph, layer, f"{layers}.{layer}", members[layer], incoming))
    return regions


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose code made this node, "" for the root or for glue."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def describe(node: fx.Node, sizes: Mapping[int, str] | None = None) -> str:
    """A node in words for an error: name, operator, shape, module path, source line.

    Args: sizes: names of the numbers that stand for symbolic sizes.
    """
    value = node.meta.get("val")
    shape = ""
    if isinstance(value, Tensor):
        names = [(sizes or {}).get(s) if type(s) is int else None for s in value.shape]
        shape = f" ({', '.join(n or str(s) for n, s in zip(names, value.shape, strict=True))})"
    path = module_path(node)
    where = f" in {path}" if path else ""
    source = (node.meta.get("stack_trace") or "").strip().splitlines()
    line = f" ({source[-2].strip()})" if len(source) > 1 else ""
    return f"{node.name}{shape} [{node.target}]{where}{line}"


def tensor_inputs(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """What a set of nodes reads from outside, in order of first use, parameters aside."""
    inside = set(nodes)
    outside: dict[fx.Node, None] = {}
    for node in sorted(inside):
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr":
                outside[source] = None
    return list(outside)


def _members(graph: fx.Graph, layers: str) -> dict[int, list[fx.Node]]:
    pattern = re.compile(rf"(?:^|\.){re.escape(layers)}\.(\d+)(?:\.|$)")
    members: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if found := pattern.search(module_path(node)):
            members.setdefault(int(found.group(1)), []).append(node)
    return members


def _region(
    graph: fx.Graph, layer: int, path: str, nodes: list[fx.Node], incoming: fx.Node | None
) -> Region:
    hidden = incoming if incoming is not None else _placeholder(graph, "inputs_embeds")
    live_ins = _read_sizes_from(graph, path, nodes, hidden)
    if hidden not in tensor_inputs(nodes):
        raise CaptureError(
            f"{path} does not read the hidden states of the layer before it, {describe(hidden)}; "
            f"it reads {', '.join(map(describe, tensor_inputs(nodes)))}"
        )
    return Region(
        layer=layer,
        path=path,
        nodes=nodes,
        hidden=hidden,
        live_ins={live_in: live_in for live_in in live_ins if live_in is not hidden},
        live_out=_live_out(path, nodes),
        attention=_attention(path, nodes),
    )


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "placeholder" and n.name == name)


def _read_sizes_from(
    graph: fx.Graph, path: str, nodes: list[fx.Node], hidden: fx.Node
) -> list[fx.Node]:
    """Replace every size that comes from outside by the size of `hidden`; return the tensors."""
    batch, length = hidden.meta["val"].shape[:2]
    tensors = []
    for source in tensor_inputs(nodes):
        value = source.meta.get("val")
        if isinstance(value, Tensor):
            tensors.append(source)
            continue
        dims = [d for d, size in enumerate((batch, length)) if str(value) == str(size)]
        if not dims:
            raise CaptureError(
                f"{path} reads {describe(source)} = {value}, which is neither the batch size {batch} "
                f"nor the length {length}; write it with sizes of the layer's own input"
            )
        with graph.inserting_before(nodes[0]):
            size = graph.call_function(_SIZE, (hidden, dims[0]))
        size.meta.update(val=value, nn_module_stack=nodes[0].meta.get("nn_module_stack"))
        for node in nodes:
            node.replace_input_with(source, size)
        nodes.insert(0, size)
    return tensors


def _live_out(path: str, nodes: list[fx.Node]) -> fx.Node:
    inside = set(nodes)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    tensors = [n for n in outputs if isinstance(n.meta.get("val"), Tensor)]
    if len(tensors) != 1 or len(outputs) != 1:
        found = ", ".join(map(describe, outputs)) or "none"
        raise CaptureError(
            f"{path} must hand on one value, its hidden states, but hands on {len(outputs)}: {found}; "
            "a decoder whose layers exchange more cannot be split at them"
        )
    return tensors[0]


def _attention(path: str, nodes: list[fx.Node]) -> fx.Node:
    found = [n for n in nodes if n.target is CAPTURED_ATTENTION]
    if len(found) != 1:
        raise CaptureError(
            f"{path} holds {len(found)} attentions, not one; its attention must go through "
            "transformers' AttentionInterface (`config._attn_implementation`)"
        )
    return found[0]
