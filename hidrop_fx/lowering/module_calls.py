"""Run each layer's part of a program inside a call of the decoder's own module, whose hooks gather or load its parameters.

Before:  %body_0 = body_0(%hidden, %cos, %sin, %layers_3_weight, ...)
         %score_body = score_body(%body_0, ..., %layers_4_weight) ; %take = take_tokens(%body_0, ...)
         %body_1 = body_1(%take, %cos_1, %sin_1, %layers_4_weight, ...)
         %mul = mul(..., %norm_weight)
After:   %unit = layers.3(%hidden, %cos, %sin)
         %unit_1 = layers.4(%unit, ...)          # scores, choice and layer: one call, one gather
         %unit_2 = norm(%unit_1)

A *unit* is all that stands between the output of one layer and that of the next; the final norm is the last. Parameters
are no part of the top graph: each is looked up in the module while its call is under way. What no module's call covers is
looked up in the decoder.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from hidrop_fx.capture.layer_wrappers import PREFIX, wrapped_chain
from hidrop_fx.capture.placement import loaded, names_looked_up
from hidrop_fx.capture.sharded import is_whole, not_gathered, outputs_as_computed
from hidrop_fx.errors import PassError
from hidrop_fx.program.program import Program

_OUTSIDE = ("placeholder", "get_attr", "output")
_NEVER = 1 << 30
_ABSENT = object()

Around = Callable[[nn.Module], AbstractContextManager[Any]]


class ModuleCall:
    """A unit in the top graph: calls a module, whose forward gives way to the unit for the time of the call.

    Args:
        module: whose call it is.
        path: of the module in the decoder.
        forward: function of the unit's values, then its parameters.
        parameters: paths in the module.
        around: entered with the module where its parameters are looked up and used, to load those that are offloaded.
        handed: places of the values that the module is called with, and hooks may change: those in the dtype that the layers
            compute in. The others, such as fp32 scores, no hook may round.
        uncast: what it returns, fp32 scores too, no hook may round; with False all is in the layers' dtype.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        forward: Callable[..., Any],
        parameters: Sequence[str],
        handed: Sequence[int],
        *,
        uncast: bool = False,
        around: Around = nullcontext,
    ) -> None:
        self.path = path
        self.__name__ = f"call_{path.replace('.', '_')}"
        self._module = module
        self._modules = wrapped_chain(module)
        self._uncast = uncast
        self._forward = forward
        self._parameters = [(name, operator.attrgetter(name)) for name in parameters]
        self._handed = tuple(handed)
        self._around = around

    def __call__(self, *values: Any) -> Any:
        module = self._module

        def inside(*handed: Any) -> Any:
            given = list(values)
            for place, value in zip(self._handed, handed, strict=True):
                given[place] = value
            with self._around(module):
                found = [
                    whole(get(module), f"{self.path}.{name}") for name, get in self._parameters
                ]
                return self._forward(*given, *found)

        handed = [values[place] for place in self._handed]
        if not self._uncast:
            return _called(self._modules, inside, *handed)
        with outputs_as_computed(self._modules):
            return _called(self._modules, inside, *handed)


def _called(modules: Sequence[nn.Module], inside: Callable[..., Any], *values: Any) -> Any:
    """Call a module, and what it wraps, hooks and all; the forward of the innermost gives way."""
    module, *inner = modules
    own = module.__dict__
    before = own.get("forward", _ABSENT)
    own["forward"] = partial(_called, inner, inside) if inner else inside
    try:
        # Not `module(...)`: older layers of transformers checkpoint around their hooks there.
        return nn.Module.__call__(module, *values)
    finally:
        if before is _ABSENT:
            del own["forward"]
        else:
            own["forward"] = before


class LookedUp:
    """A parameter in the top graph that no module's call covers, such as one in front of the layers."""

    def __init__(self, decoder: nn.Module, path: str, around: Around = nullcontext) -> None:
        self.path = path
        self.__name__ = f"look_up_{path.replace('.', '_')}"
        self._decoder = decoder
        self._get = operator.attrgetter(path)
        self._owner = path.rpartition(".")[0]
        self._around = around

    def __call__(self) -> Tensor:
        with self._around(self._decoder.get_submodule(self._owner)):
            return whole(self._get(self._decoder), self.path)


def whole(tensor: Tensor, path: str) -> Tensor:
    """Return a parameter that was gathered.

    Raises:
        HidropError: it was not.
    """
    if not is_whole(tensor):
        raise not_gathered(path, tensor)
    return tensor


def called_as_modules(program: Program, top: fx.Graph, decoder: nn.Module) -> fx.Graph:
    """Return a top graph in which the nodes of each unit are one call of its module.

    Args:
        top: calls of bodies, and nodes between them, with shapes in `meta["val"]`.
        decoder: the text decoder whose modules are called.

    Raises:
        PassError: a pass let a layer depend on a later one.
    """
    paths, unit_of = _units(program, top)
    _check_order(top, unit_of, paths)
    members: dict[int, list[fx.Node]] = {}
    for node in top.nodes:
        if node in unit_of:
            members.setdefault(unit_of[node], []).append(node)
    around: Around = nullcontext
    if program.captured.placement is not None:
        around = loaded  # not the hooks of the call: those of accelerate are part of `forward`, which gives way
    parameters = {name.replace(PREFIX, "") for name in names_looked_up(decoder)}
    grouped = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for step in _ordered(top, unit_of, members):
        if isinstance(step, int):
            _copy_unit(grouped, copies, members[step], paths[step], program, decoder, around)
        elif step.op != "get_attr":
            copies[step] = grouped.node_copy(step, copies.__getitem__)
        elif any(
            user not in unit_of or not _is_within(step, paths[unit_of[user]]) for user in step.users
        ):
            path = str(step.target)
            if path in parameters:
                copies[step] = grouped.call_function(LookedUp(decoder, path, around))
            else:
                copies[step] = grouped.node_copy(step)
    grouped.lint()
    return grouped


def _units(program: Program, top: fx.Graph) -> tuple[dict[int, str], dict[fx.Node, int]]:
    """Return the module path of each unit, and the unit of each node that is in one."""
    layers, count = program.captured.layers, program.captured.num_layers
    paths = {k: f"{layers}.{k}" for k in range(count)}
    nodes = [node for node in top.nodes if node.op not in _OUTSIDE]
    found: dict[fx.Node, int] = {}
    above: dict[fx.Node, int] = {}
    for node in nodes:
        above[node] = max((above.get(n, -1) for n in node.all_input_nodes), default=-1)
        own = _unit_of_parameters(node, paths)
        step = str(node.meta.get("hidrop", ""))
        if step.startswith("layer_"):
            own = int(step.rpartition("_")[2])
        if own is None and above[node] == count - 1:
            own = _behind_the_layers(node, count, paths)
        if own is not None:
            found[node] = own
        above[node] = max(above[node], found.get(node, -1))
    below: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        below[node] = found.get(
            node, min((below.get(u, _NEVER) for u in node.users), default=_NEVER)
        )
    effects = {node for node in nodes if node.meta.get("effect")}
    for node in nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in found:
            found[node] = found[source]
        elif node in found or above[node] < 0:
            continue
        elif below[node] < _NEVER:
            found[node] = below[node]
        elif node in effects:
            found[node] = above[node]
    return paths, found


def _unit_of_parameters(node: fx.Node, paths: dict[int, str]) -> int | None:
    """Return the last unit whose parameters a node reads."""
    read = [n for n in node.all_input_nodes if n.op == "get_attr"]
    found = [unit for unit, path in paths.items() if any(_is_within(n, path) for n in read)]
    return max(found) if found else None


def _behind_the_layers(node: fx.Node, unit: int, paths: dict[int, str]) -> int | None:
    """Make the module whose parameter a node behind the layers reads the last unit: the final norm."""
    for read in node.all_input_nodes:
        owner = str(read.target).rpartition(".")[0] if read.op == "get_attr" else ""
        if (
            owner
            and isinstance(read.meta.get("val"), Tensor)
            and read.meta["val"].is_floating_point()
        ):
            paths[unit] = owner
            return unit
    return None


def _is_within(node: fx.Node, path: str) -> bool:
    return str(node.target).startswith(f"{path}.")


def _check_order(top: fx.Graph, unit_of: dict[fx.Node, int], paths: dict[int, str]) -> None:
    for node in top.nodes:
        for read in node.all_input_nodes:
            if node in unit_of and read in unit_of and unit_of[read] > unit_of[node]:
                raise PassError(
                    f"{node.name}, which belongs to {paths[unit_of[node]]}, reads {read.name} of {paths[unit_of[read]]}: where "
                    "layers are called as modules (fully_shard, offloading), none can depend on a later one. Leave that pass out"
                )


def _ordered(
    top: fx.Graph, unit_of: dict[fx.Node, int], members: dict[int, list[fx.Node]]
) -> list[fx.Node | int]:
    """Order nodes outside units and units so that each follows all that it reads."""
    done: set[fx.Node] = set()
    order: list[fx.Node | int] = []
    waiting: list[fx.Node | int] = list(dict.fromkeys(unit_of.get(n, n) for n in top.nodes))
    while waiting:
        for step in waiting:
            nodes = members[step] if isinstance(step, int) else [step]
            inside = set(nodes)
            if all(n in done or n in inside for node in nodes for n in node.all_input_nodes):
                break
        else:
            raise AssertionError(f"units depend on each other in a circle: {waiting[:4]}")
        waiting.remove(step)
        order.append(step)
        done.update(nodes)
    return order


def _copy_unit(
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    nodes: list[fx.Node],
    path: str,
    program: Program,
    decoder: nn.Module,
    around: Around,
) -> None:
    """Put the call of a module in the place of a unit's nodes."""
    inside = set(nodes)
    reads = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    own = [n for n in reads if n.op == "get_attr" and _is_within(n, path)]
    values = [n for n in reads if n not in own]
    outs = [n for n in nodes if any(user not in inside for user in n.users)]
    body = fx.Graph()
    inner = {node: body.placeholder(node.name) for node in values}
    inner |= {node: body.placeholder(f"parameter_{place}") for place, node in enumerate(own)}
    for node in nodes:
        inner[node] = body.node_copy(node, inner.__getitem__)
    results = [inner[node] for node in outs]
    body.output(results[0] if len(results) == 1 else tuple(results))
    unit = ModuleCall(
        decoder.get_submodule(path),
        path,
        fx.GraphModule({}, body, "Unit").forward,
        [str(node.target)[len(path) + 1 :] for node in own],
        [place for place, node in enumerate(values) if _is_handed(node, program)],
        uncast=any(_is_rounded(node, program) for node in outs),
        around=around,
    )
    call = graph.call_function(unit, tuple(copies[node] for node in values))
    if len(outs) == 1:
        copies[outs[0]] = call
        return
    for place, node in enumerate(outs):
        copies[node] = graph.call_function(operator.getitem, (call, place))


def _is_rounded(node: fx.Node, program: Program) -> bool:
    """Return True for numbers in another dtype than that of the layers."""
    value = node.meta.get("val")
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return not isinstance(value, Tensor) or (floating and value.dtype != program.dtype)


def _is_handed(node: fx.Node, program: Program) -> bool:
    value = node.meta.get("val")
    spec = program.specs.get(node.name) if node.op == "placeholder" else None
    written = spec is not None and spec.static
    return isinstance(value, Tensor) and value.dtype == program.dtype and not written
