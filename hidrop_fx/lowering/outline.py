"""Lower a program: a short top graph over layer bodies that are compiled once.

    hidden = body_0(hidden, cos, sin, *parameters of layer 0)
    hidden = body_0(hidden, cos, sin, *parameters of layer 1)
    ...

The nodes of a layer, and those of a prune, become a *subgraph*: a function of its live-ins and its
parameters. Pieces that are equal but for the parameters share one *body*, compiled with symbolic
batch and length, so that 32 layers cost as much to compile as two or three, and another prompt
length nothing. What lies between subgraphs (token bookkeeping, RoPE tables) runs as it is.
"""

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor, fx

from hidrop_fx.lowering.body import Body, Recomputable, recomputing
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.shape_policy import COMPILE, NewShapes
from hidrop_fx.program.program import Program, is_symbolic

logger = logging.getLogger("hidrop_fx")

# The one subgraph of a program that is compiled as one graph.
_WHOLE = "program"


class Executable:
    """A program that can be called: named tensors in, named tensors out.

    Attributes:
        program: what it was made from.
        top: the graph that calls the bodies.
        bodies: by name; each with the subgraphs that share it in `used_by`.
    """

    def __init__(self, program: Program, top: fx.GraphModule, bodies: dict[str, Body]) -> None:
        self.program = program
        self.top = top
        self.bodies = bodies
        self.inputs = tuple(program.inputs)
        self.calls = 0

    def __call__(self, inputs: dict[str, Tensor], *, recompute: bool = False) -> dict[str, Tensor]:
        """Run.

        Args:
            recompute: let layers compute their activations again in backward.
        """
        self.calls += 1
        if recompute and not self.layered:
            logger.warning(
                "gradient checkpointing has no effect with lowering='whole', where layers are not "
                "called one by one; use lowering='bodies' or activation_memory_budget"
            )
        with recomputing(recompute):
            return self.run_top([inputs[name] for name in self.inputs])

    @cached_property
    def run_top(self) -> Callable[[list[Tensor]], dict[str, Tensor]]:
        """`top` as it is called: with a list of inputs, its parameters looked up before."""
        return _with_parameters_at_hand(self.top)

    @property
    def layered(self) -> bool:
        """Whether decoder layers are called one by one."""
        return not any(body.name.endswith("program") for body in self.bodies.values())


def lower(
    program: Program,
    *,
    backend: str,
    lowering: str,
    log: CompileLog,
    shared: dict[str, Body],
    new_shapes: NewShapes = COMPILE,
    memory_budget: float | None = None,
) -> Executable:
    """Make a program executable.

    Args:
        backend: "inductor", "aot_eager" (graphs through AOTAutograd, no code generation) or "eager".
        lowering: "bodies", or "whole" to compile the program as one graph.
        new_shapes: whether what was not compiled yet may be.
        shared: bodies made so far, by structure; equal subgraphs of other programs reuse them.
        memory_budget: share of the activations to keep for backward, in (0, 1]; PyTorch's
            `activation_memory_budget`.
    """
    make = partial(
        Body, backend=backend, log=log, new_shapes=new_shapes, memory_budget=memory_budget
    )
    subgraphs = _everything(program) if lowering == "whole" else _pieces(program)
    top, bodies = _outline(program, subgraphs, make, shared)
    return Executable(program, top, bodies)


def _with_parameters_at_hand(top: fx.GraphModule) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    """The top graph as a function that does not look for its parameters in every call.

    Nine a layer, each some attributes deep, would cost a small model several per cent of a prompt.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(top.graph.nodes)
    parameters = [node for node in nodes if node.op == "get_attr"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    for node in (*inputs, *parameters):
        copies[node] = graph.placeholder(node.name)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    forward = fx.GraphModule({}, graph, "Top").forward
    tensors = [operator.attrgetter(str(node.target))(top) for node in parameters]
    return lambda given: forward(*given, *tensors)


def _pieces(program: Program) -> dict[fx.Node, str]:
    named = dict(program.subgraphs)
    for region in program.regions:
        named |= dict.fromkeys(region.nodes, f"layer_{region.layer}")
    return named


def _everything(program: Program) -> dict[fx.Node, str]:
    outside = ("placeholder", "get_attr", "output")
    return {node: _WHOLE for node in program.graph.nodes if node.op not in outside}


def _outline(
    program: Program,
    subgraphs: dict[fx.Node, str],
    make: Callable[..., Body],
    shared: dict[str, Body],
) -> tuple[fx.GraphModule, dict[str, Body]]:
    """Replace every subgraph by one call of its body."""
    members: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node in subgraphs:
            members.setdefault(subgraphs[node], []).append(node)

    top = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    used: dict[str, Body] = {}
    for unit in _topological_order(program.graph, subgraphs, members):
        if isinstance(unit, fx.Node):
            copies[unit] = top.node_copy(unit, copies.__getitem__)
            continue
        nodes = members[unit]
        live_ins, live_outs = _boundary(nodes)
        module, key = _extract(nodes, live_ins, live_outs)
        body = shared.get(key)
        if body is None:
            # Decode is called with another length in every step, which nothing remembered would serve.
            body = make(
                _body_name(program, unit, shared), module, bypass_guards=program.kind != "decode"
            )
            shared[key] = body
        body.used_by.append(program.kind if unit == _WHOLE else f"{program.kind} {unit}")
        used[body.name.replace(" ", "_")] = body
        call = top.call_module(
            body.name.replace(" ", "_"), tuple(copies[node] for node in live_ins)
        )
        call.meta["hidrop"] = unit
        call.meta["recomputable"] = program.kind == "train" and unit.startswith("layer_")
        if len(live_outs) == 1:
            copies[live_outs[0]] = call
        else:
            for index, node in enumerate(live_outs):
                copies[node] = top.call_function(operator.getitem, (call, index))
    top.lint()
    return _module({**_attributes(program.module, top), **used}, top, "Top"), used


def _body_name(program: Program, unit: str, shared: dict[str, Body]) -> str:
    if unit == _WHOLE:
        return f"{program.kind} program"
    prefix = f"{program.kind} {unit.rsplit('_', 1)[0]} body"
    return f"{prefix} {1 + sum(body.name.startswith(prefix) for body in shared.values())}"


def _topological_order(
    graph: fx.Graph, subgraphs: dict[fx.Node, str], members: dict[str, list[fx.Node]]
) -> list[fx.Node | str]:
    """Nodes outside subgraphs and names of subgraphs, each after all that it reads."""
    done: set[fx.Node] = set()
    order: list[fx.Node | str] = []
    waiting: list[fx.Node | str] = []
    for node in graph.nodes:
        unit: fx.Node | str = subgraphs.get(node, node)
        if unit not in waiting:
            waiting.append(unit)
    while waiting:
        ready = None
        for unit in waiting:
            nodes = members[unit] if isinstance(unit, str) else [unit]
            inside = set(nodes)
            if all(n in done or n in inside for m in nodes for n in m.all_input_nodes):
                ready = unit
                break
        if ready is None:
            raise AssertionError(f"subgraphs depend on each other in a circle: {waiting[:4]}")
        waiting.remove(ready)
        order.append(ready)
        done.update(members[ready] if isinstance(ready, str) else [ready])
    return order


def _boundary(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Live-ins (values first, then parameters) and live-outs of a subgraph."""
    inside = set(nodes)
    reads = dict.fromkeys(n for m in nodes for n in m.all_input_nodes if n not in inside)
    live_ins = [n for n in reads if n.op != "get_attr"] + [n for n in reads if n.op == "get_attr"]
    live_outs = [n for n in nodes if any(user not in inside for user in n.users)]
    return live_ins, live_outs


def _extract(
    nodes: list[fx.Node], live_ins: list[fx.Node], live_outs: list[fx.Node]
) -> tuple[fx.GraphModule, str]:
    """A subgraph as a module of its own, and a key that equal subgraphs have in common."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    numbers: dict[fx.Node, str] = {}
    key: list[str] = []
    for index, node in enumerate(live_ins):
        copies[node] = graph.placeholder(
            f"parameter_{index}" if node.op == "get_attr" else node.name
        )
        copies[node].meta["val"] = node.meta["val"]
        numbers[node] = f"%{len(numbers)}"
        key.append(_signature(node))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        numbers[node] = f"%{len(numbers)}"
        args: Any = fx.map_arg((node.args, node.kwargs), lambda n: _Number(numbers[n]))  # type: ignore[arg-type, return-value]
        key.append(f"{node.target}{args}")
    outputs = [copies[node] for node in live_outs]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    key.append(" ".join(numbers[node] for node in live_outs))
    return fx.GraphModule({}, graph, "Body"), "\n".join(key)


@dataclass(frozen=True)
class _Number:
    text: str

    def __repr__(self) -> str:
        return self.text


def _signature(node: fx.Node) -> str:
    value: Tensor = node.meta["val"]
    sizes = ["*" if is_symbolic(s) else str(s) for s in value.shape]
    return f"{value.dtype}[{', '.join(sizes)}] {value.device} {node.meta.get('layout', '')}"


def _attributes(module: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    names = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    return {name: operator.attrgetter(name)(module) for name in names}


def _module(attributes: dict[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module whose bodies are plain callables."""
    bodies = {k: v for k, v in attributes.items() if isinstance(v, Body)}
    tensors = {k: v for k, v in attributes.items() if k not in bodies}
    for node in graph.nodes:
        if node.op == "call_module":
            body = bodies[node.target]
            target: Any = Recomputable(body) if node.meta.get("recomputable") else body
            target.__name__ = body.name.replace(" ", "_")
            node.op, node.target = "call_function", target
    module = fx.GraphModule(tensors, graph, name)
    return module
