"""A program that can be called: named tensors in, named tensors out.

executable = lower(program, ...)
outputs = executable({"inputs_embeds": embeds, ...})
"""

import logging
import operator
from collections.abc import Callable
from functools import cached_property

from torch import Tensor, fx

from hidrop_fx.lowering.checkpointing import recomputing
from hidrop_fx.lowering.layer_body import Body
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.program import Program

logger = logging.getLogger("hidrop_fx")


class Executable:
    """A lowered program.

    Attributes:
        program: the program that it was lowered from.
        top: the graph that calls the layer bodies.
        bodies: layer bodies by name, each with the subgraphs that share it in `used_by`.
        inputs: names of the input tensors, in order.
        calls: number of calls so far.
    """

    def __init__(self, program: Program, top: fx.GraphModule, bodies: dict[str, Body]) -> None:
        self.program = program
        self.top = top
        self.bodies = bodies
        self.inputs = tuple(program.inputs)
        self.calls = 0

    def __call__(self, inputs: dict[str, Tensor], *, recompute: bool = False) -> dict[str, Tensor]:
        """Run the program.

        Args:
            inputs: a tensor for every name in `self.inputs`; others are ignored.
            recompute: recompute the activations of each layer in backward.
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
        """`top` as a function of the list of inputs, with its parameters bound."""
        return _bind_parameters(self.top)

    @cached_property
    def specs(self) -> tuple[InputSpec, ...]:
        """Declarations of the inputs, in order."""
        return self.program.declared_inputs

    @cached_property
    def static_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that are read and written where they lie."""
        return tuple(spec.name for spec in self.specs if spec.static)

    @property
    def layered(self) -> bool:
        """True if decoder layers are called one by one, and not compiled as one graph."""
        return not any(body.name.endswith("program") for body in self.bodies.values())


def _bind_parameters(top: fx.GraphModule) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    """Bind the parameters of the top graph once.

    Resolving about nine attribute paths a layer in every call costs a small model several per cent
    of a prefill.
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
