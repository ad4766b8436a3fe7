"""A program that can be called: named tensors in, named tensors out.

executable = lower(program, ...)
outputs = executable({"inputs_embeds": embeds, ...})
"""

import copy
import logging
import operator
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from hidrop_fx.capture.quantised import is_distributed
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
        forward, bound = self._unbound
        divided = [is_distributed(value) for value in bound]
        if any(divided):
            return lambda given: forward(*given, *map(_own_part, bound, divided))
        return lambda given: forward(*given, *bound)

    @cached_property
    def _unbound(self) -> tuple[Callable[..., dict[str, Tensor]], list[Tensor]]:
        return _lift_parameters(self.top)

    def with_tensors(self, replaced: Mapping[int, Tensor]) -> "Executable":
        """Return the same program on other tensors, which it takes by the identity of those in their place."""
        twin = copy.copy(self)
        forward, bound = self._unbound
        others = [replaced.get(id(value), value) for value in bound]
        twin.__dict__["run_top"] = lambda given: forward(*given, *others)
        return twin

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers that a call reads."""
        return self._tensors

    @cached_property
    def _tensors(self) -> list[Tensor]:
        module = self.program.module
        names = dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr")
        found = (operator.attrgetter(name)(module) for name in names)
        return list({id(value): value for value in found}.values())

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters of the program that require a gradient now."""
        return [p for p in self._parameters if p.requires_grad]

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        return [value for value in self._tensors if isinstance(value, nn.Parameter)]

    def state(self, *, grad: bool) -> tuple[Hashable, ...]:
        """Return what else than its inputs a call depends on, and may change from one to the next.

        Args:
            grad: the call is differentiable.
        """
        return tuple([p.requires_grad for p in self._parameters]) if grad else ()

    @cached_property
    def specs(self) -> tuple[InputSpec, ...]:
        """Declarations of the inputs, in order."""
        return self.program.declared_inputs

    @cached_property
    def static_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that are read and written where they lie."""
        return tuple(spec.name for spec in self.specs if spec.static)

    @cached_property
    def updated_inputs(self) -> tuple[str, ...]:
        """Names of those of them that a second run would go on from."""
        return tuple(spec.name for spec in self.specs if spec.updated)

    @property
    def layered(self) -> bool:
        """True if decoder layers are called one by one, and not compiled as one graph."""
        return not any(body.name.endswith("program") for body in self.bodies.values())


def _own_part(parameter: Any, divided: bool) -> Tensor:
    """Return what this process holds of a parameter, with its gradient if there is to be one."""
    if not divided:
        return parameter
    if parameter.requires_grad and torch.is_grad_enabled():
        return parameter.to_local()
    return parameter._local_tensor


def _lift_parameters(
    top: fx.GraphModule,
) -> tuple[Callable[..., dict[str, Tensor]], list[Tensor]]:
    """Make the parameters of the top graph arguments behind its inputs, and return them beside it.

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
    return forward, [operator.attrgetter(str(node.target))(top) for node in parameters]
