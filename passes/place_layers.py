"""Put each layer on the device of its weights, and copy what one device reads of another.

    hidden = layers[15](hidden, cos, sin)                        # on cuda:0
    hidden, cos, sin = (v.to("cuda:1") for v in (hidden, cos, sin))
    hidden = layers[16](hidden, cos, sin)                        # on cuda:1, as all behind it

Before:  %add_95 = layers.16(%add_89, %cos_1, %sin_1)
After:   %copied = copied(%add_89, cuda:1) ; %copied_1 = copied(%cos_1, cuda:1) ; ...
         %add_95 = layers.16(%copied, %copied_1, %copied_2)

Inputs lie with the token embedding, a layer's key and value buffers with the layer. What stands in front of a layer (a prune,
an injection, gathered rows of a table) runs where the layer does; what reads the layer's weights or writes its buffers runs
there wherever it stands. A value is copied to a device once, however many layers read it there. Columns, which a cache
keeps of all layers together, are returned to the device of the inputs.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from hidrop_fx.capture.placement import Placement
from hidrop_fx.planning import Plan
from hidrop_fx.program.inputs import KVPart
from hidrop_fx.program.outputs import COLUMNS
from hidrop_fx.program.program import PassResult, Program

_CODE = ("call_function", "call_method", "call_module")
_SIZE = torch.ops.aten.sym_size.int
_UNKNOWN = torch.empty(0, device="cpu")
_OF_ITS_INPUT = (_SIZE, operator.getitem)


def copied(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on another device; its gradient comes back."""
    return value.to(device)


def place_layers(program: Program, plan: Plan) -> PassResult:
    """Choose the device of every node, then copy each value to the other devices that read it."""
    placement = program.captured.placement
    if placement is None or not placement.spread:
        return PassResult(matched=0, note="one device")
    program.placed = placement.layers
    devices = _devices(program, placement)
    _fake_sources(program, devices)
    for node in program.graph.nodes:
        if node.op in _CODE and devices[node] != program.device:
            _create_on(node, program.device, devices[node])
    copies = _copy_inputs(program, devices)
    for region in program.regions:
        here = devices[region.nodes[0]]
        region.hidden = copies.get((region.hidden, here), region.hidden)
        region.live_ins = {k: copies.get((v, here), v) for k, v in region.live_ins.items()}
    _return_columns(program, devices)
    used = dict.fromkeys(map(str, (placement.entry, *placement.layers, placement.norm)))
    return PassResult(matched=len(copies), note=f"on {', '.join(used)}")


def _devices(program: Program, placement: Placement) -> dict[fx.Node, torch.device]:
    """Choose where each node is computed, or lies."""
    inside = {node: region for region in program.regions for node in region.nodes}
    inside |= {n: r for branch in program.branches for r in branch.regions for n in r.nodes}
    units: dict[Any, list[fx.Node]] = {}
    for node in program.graph.nodes:
        unit = id(inside[node]) if node in inside else program.subgraphs.get(node)
        if unit is not None:
            units.setdefault(unit, []).append(node)
    found: dict[fx.Node, torch.device] = {}
    for unit, nodes in units.items():
        layer = inside[nodes[0]].layer if nodes[0] in inside else _layer_named(unit)
        device = _of_weights(program, nodes)
        if device is None and layer is not None:
            device = placement.layers[layer]
        if device is not None:
            found |= dict.fromkeys(nodes, device)
    here = placement.norm
    for node in reversed(program.graph.nodes):
        if node in inside and node in found:
            here = found[node]
        found.setdefault(node, here)
    for nodes in units.values():
        found |= dict.fromkeys(nodes, found[nodes[0]])
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = _of_input(program, node, placement)
        elif node.op == "get_attr":
            found[node] = _tensor(program, node).device
        elif (node in program.effects and isinstance(node.args[0], fx.Node)) or (
            node.target in _OF_ITS_INPUT and isinstance(node.args[0], fx.Node)
        ):
            found[node] = found[node.args[0]]
    return found


def _layer_named(subgraph: str) -> int | None:
    """Return the layer that a subgraph belongs to, by its name: "prune_10"."""
    last = subgraph.rpartition("_")[2]
    return int(last) if last.isdecimal() else None


def _of_weights(program: Program, nodes: list[fx.Node]) -> torch.device | None:
    """Return the device of the parameters that nodes read; None if they read none."""
    for node in nodes:
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                tensor = _tensor(program, read)
                if isinstance(tensor, torch.nn.Parameter):
                    return tensor.device
    return None


def _of_input(program: Program, node: fx.Node, placement: Placement) -> torch.device:
    fill = program.specs[node.name].fill
    return placement.layers[fill.layer] if isinstance(fill, KVPart) else program.device


def _tensor(program: Program, node: fx.Node) -> Tensor:
    found: Tensor = operator.attrgetter(str(node.target))(program.module)
    return found


def _fake_sources(program: Program, devices: dict[fx.Node, torch.device]) -> None:
    """Let shape inference know where inputs and weights lie, as it does of all that is computed from them."""
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr") and devices[node] != node.meta["val"].device:
            with program.fake_mode:
                node.meta["val"] = node.meta["val"].to(devices[node])


def _create_on(node: fx.Node, traced: torch.device, device: torch.device) -> None:
    """Let a node that makes tensors on the device that was traced on make them on another."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value == traced else value

    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), moved)


def _copy_inputs(
    program: Program, devices: dict[fx.Node, torch.device]
) -> dict[tuple[fx.Node, torch.device], fx.Node]:
    """Insert a copy of each value for each other device that reads it, and return them."""
    copies: dict[tuple[fx.Node, torch.device], fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op not in _CODE:
            continue
        for read in node.all_input_nodes:
            if devices[read] != devices[node] and _is_tensor(read):
                copy = _copy(program, read, devices[node], copies)
                node.replace_input_with(read, copy)
    return copies


def _copy(
    program: Program,
    value: fx.Node,
    device: torch.device,
    known: dict[tuple[fx.Node, torch.device], fx.Node],
) -> fx.Node:
    place = value, device
    if place not in known:
        behind = max(value, [n for n in program.graph.nodes if n.op == "placeholder"][-1])
        known[place] = program.call(copied, value, device, before=behind.next)
    return known[place]


def _is_tensor(node: fx.Node) -> bool:
    """Return False for what is known to be a number: nodes that passes made give tensors."""
    return node.target is not _SIZE and isinstance(node.meta.get("val", _UNKNOWN), Tensor)


def _return_columns(program: Program, devices: dict[fx.Node, torch.device]) -> None:
    outputs, end = program.outputs, program.graph.output_node()
    for name, node in outputs.items():
        if name.startswith(COLUMNS) and devices[node] != program.device:
            outputs[name] = program.call(copied, node, program.device, before=end)
    program.returns(outputs)
