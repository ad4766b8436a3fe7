"""Lower a program: a short top graph over layer bodies that are compiled once.

    hidden = body_0(hidden, cos, sin, *parameters of layer 0)
    hidden = body_0(hidden, cos, sin, *parameters of layer 1)
    ...

The nodes of a layer, of a score and of a prune form a *subgraph*: a function of its live-ins and its
parameters. Subgraphs that are equal but for the parameters share one *layer body*, compiled with
symbolic batch and length, so that 32 layers cost as much to compile as two or three, and another
prompt length nothing. What lies between subgraphs (token bookkeeping, RoPE tables) runs as it is.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from hidrop_fx.capture.late_module import LateModule
from hidrop_fx.lowering.checkpointing import Recomputable
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.layer_body import Body
from hidrop_fx.lowering.module_calls import called_as_modules
from hidrop_fx.lowering.shape_policy import COMPILE, ShapePolicy
from hidrop_fx.program.operands import operand_text
from hidrop_fx.program.program import Program
from hidrop_fx.program.symbols import Symbols
from hidrop_fx.surroundings import neutral_surroundings

# The subgraph of a program that is compiled as one graph.
_WHOLE = "program"


@neutral_surroundings()
def lower(
    program: Program,
    *,
    backend: str,
    lowering: str,
    log: CompileLog,
    shared: dict[str, Body],
    shape_policy: ShapePolicy = COMPILE,
    memory_budget: float | None = None,
    decoder: nn.Module | None = None,
) -> Executable:
    """Make a program executable.

    Args:
        program: the program, with shapes in `meta["val"]` of its nodes.
        backend: "inductor", "aot_eager" (graphs through AOTAutograd, no code generation) or "eager".
        lowering: "bodies", or "whole" to compile the program as one graph.
        log: log of compilations and fallbacks.
        shared: layer bodies by structure. Equal subgraphs of other programs reuse them; new ones
            are added.
        shape_policy: policy for calls that would compile.
        memory_budget: share of the activations to keep for backward, in (0, 1]; PyTorch's
            `activation_memory_budget`.
        decoder: the text decoder whose layers are called as modules, since hooks of theirs gather their parameters; None
            lets the program read its own parameters.
    """
    make = partial(
        Body, backend=backend, log=log, shape_policy=shape_policy, memory_budget=memory_budget
    )
    subgraphs = _whole(program) if lowering == "whole" else _subgraphs(program)
    top, bodies = _outline(program, subgraphs, make, shared, decoder)
    return Executable(program, top, bodies)


def _subgraphs(program: Program) -> dict[fx.Node, str]:
    """Return the subgraph of each node: that of its layer, or one that a pass named.

    Where a prefill runs on a CPU, what scores tokens, chooses and moves them runs as it is, and of a score only the keys of
    all tokens are compiled: generated code for the rest saves half a millisecond a prune, and takes seconds to compile.
    Elsewhere the keys are part of the score's subgraph.
    """
    plain = program.device.type == "cpu" and not program.differentiable
    named: dict[fx.Node, str] = {}
    for node, name in program.subgraphs.items():
        kind, _, layer = name.rpartition("_")
        if not (plain and kind in ("score", "prune")):
            named[node] = f"score_{layer}" if kind == "keys" and not plain else name
    for region in program.regions:
        named |= dict.fromkeys(region.nodes, f"layer_{region.layer}")
    return named


def _whole(program: Program) -> dict[fx.Node, str]:
    """Return one subgraph for all nodes."""
    outside = ("placeholder", "get_attr", "output")
    return {node: _WHOLE for node in program.graph.nodes if node.op not in outside}


def _outline(
    program: Program,
    subgraphs: dict[fx.Node, str],
    make: Callable[..., Body],
    shared: dict[str, Body],
    decoder: nn.Module | None,
) -> tuple[fx.GraphModule, dict[str, Body]]:
    """Replace every subgraph by one call of its layer body.

    Returns:
        The top graph, and the layer bodies that it calls, by name.
    """
    members: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node in subgraphs:
            members.setdefault(subgraphs[node], []).append(node)

    top = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    used: dict[str, Body] = {}
    for step in _topological_order(program.graph, subgraphs, members):
        if isinstance(step, fx.Node):
            copies[step] = top.node_copy(step, copies.__getitem__)
            copies[step].meta["effect"] = step in program.effects
            copies[step].meta["subgraph"] = program.subgraphs.get(step, "")
            continue
        nodes = members[step]
        live_ins, live_outs = _boundary(nodes)
        graph, key = _extract(nodes, live_ins, live_outs, program.symbols)
        body = shared.get(key)
        if body is None:
            # A decode step never has the shapes of an earlier one.
            bypass = program.kind != "decode"
            module = fx.GraphModule({}, graph, "Body")
            body = make(_body_name(program, step, shared), module, bypass_guards=bypass)
            shared[key] = body
        body.used_by.append(program.kind if step == _WHOLE else f"{program.kind} {step}")
        name = body.name.replace(" ", "_")
        used[name] = body
        call = top.call_module(name, tuple(copies[node] for node in live_ins))
        call.meta["hidrop"] = call.meta["subgraph"] = step
        call.meta["recomputable"] = program.kind == "train" and step.startswith("layer_")
        call.meta["effect"] = any(node in program.effects for node in nodes)
        if len(live_outs) == 1:
            copies[live_outs[0]] = call
        else:
            for index, node in enumerate(live_outs):
                copies[node] = top.call_function(operator.getitem, (call, index))
        for node in live_outs:
            copies[node].meta["val"] = node.meta["val"]
    top.lint()
    _call_bodies(top, used)
    if decoder is not None:
        top = called_as_modules(program, top, decoder)
    return LateModule(_attributes(program.module, top), top, "Top"), used


def _body_name(program: Program, subgraph: str, shared: dict[str, Body]) -> str:
    """Return an unused name, e.g. "prefill layer body 2" for the subgraph "layer_3"."""
    if subgraph == _WHOLE:
        return f"{program.kind} program"
    prefix = f"{program.kind} {subgraph.rsplit('_', 1)[0]} body"
    return f"{prefix} {1 + sum(body.name.startswith(prefix) for body in shared.values())}"


def _topological_order(
    graph: fx.Graph, subgraphs: dict[fx.Node, str], members: dict[str, list[fx.Node]]
) -> list[fx.Node | str]:
    """Order nodes outside subgraphs and names of subgraphs so that each follows all that it reads."""
    done: set[fx.Node] = set()
    order: list[fx.Node | str] = []
    waiting: list[fx.Node | str] = []
    for node in graph.nodes:
        step: fx.Node | str = subgraphs.get(node, node)
        if step not in waiting:
            waiting.append(step)
    while waiting:
        ready = None
        for step in waiting:
            nodes = members[step] if isinstance(step, str) else [step]
            inside = set(nodes)
            if all(n in done or n in inside for m in nodes for n in m.all_input_nodes):
                ready = step
                break
        if ready is None:
            raise AssertionError(f"subgraphs depend on each other in a circle: {waiting[:4]}")
        waiting.remove(ready)
        order.append(ready)
        done.update(members[ready] if isinstance(ready, str) else [ready])
    return order


def _boundary(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the live-ins (values first, then parameters) and the live-outs of a subgraph."""
    inside = set(nodes)
    reads = dict.fromkeys(n for m in nodes for n in m.all_input_nodes if n not in inside)
    live_ins = [n for n in reads if n.op != "get_attr"] + [n for n in reads if n.op == "get_attr"]
    live_outs = [n for n in nodes if any(user not in inside for user in n.users)]
    return live_ins, live_outs


def _extract(
    nodes: list[fx.Node], live_ins: list[fx.Node], live_outs: list[fx.Node], symbols: Symbols
) -> tuple[fx.Graph, str]:
    """Copy a subgraph into a graph of its own.

    Returns:
        The graph, and its structural key: equal for subgraphs that differ in parameters alone.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    numbers: dict[fx.Node, str] = {}
    key: list[str] = []
    for index, node in enumerate(live_ins):
        copies[node] = graph.placeholder(
            f"parameter_{index}" if node.op == "get_attr" else node.name
        )
        copies[node].meta["val"] = node.meta["val"]
        copies[node].meta["symbolic_dims"] = symbols.dims(node.meta["val"].shape)
        numbers[node] = f"%{len(numbers)}"
        key.append(_signature(node, symbols))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        numbers[node] = f"%{len(numbers)}"
        key.append(f"{node.target}{operand_text(node, numbers.__getitem__)}")
    outputs = [copies[node] for node in live_outs]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    key.append(" ".join(numbers[node] for node in live_outs))
    return graph, "\n".join(key)


def _signature(node: fx.Node, symbols: Symbols) -> str:
    """Return dtype, shape, device and quantised layout of a live-in; "*" stands for a symbolic size."""
    value: Tensor = node.meta["val"]
    sizes = ["*" if symbols.is_symbolic(s) else str(s) for s in value.shape]
    return f"{value.dtype}[{', '.join(sizes)}] {value.device} {node.meta.get('layout', '')}"


def _attributes(module: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    names = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    return {name: operator.attrgetter(name)(module) for name in names}


def _call_bodies(graph: fx.Graph, bodies: dict[str, Body]) -> None:
    """Call layer bodies as plain functions."""
    for node in graph.nodes:
        if node.op == "call_module":
            body = bodies[str(node.target)]
            target: Any = Recomputable(body) if node.meta.get("recomputable") else body
            target.__name__ = body.name.replace(" ", "_")
            node.op, node.target = "call_function", target
