"""Checks after every pass, and the tidying that goes before them."""

import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from hidrop_fx.capture.regions import tensor_inputs
from hidrop_fx.errors import PassError

if TYPE_CHECKING:
    from hidrop_fx.program.program import Program


def tidy(program: "Program") -> None:
    """Remove dead nodes, and take those between nodes of one compiled unit into it."""
    _remove_dead_code(program)
    _adopt(program)


def lint(program: "Program", name: str) -> None:
    """Raise `PassError` where the graph is malformed after the pass `name`."""
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise PassError(f"the graph is malformed after {name}: {error}") from error


def verify(program: "Program", name: str, added: Iterable[fx.Node]) -> None:
    """Check what every pass must leave intact.

    Args:
        name: of the pass that ran.
        added: the nodes that it added.

    Raises:
        PassError: the graph is malformed, a layer's hidden states are not read, a layer does not read
            its own, or a node holds a number that stands for a length.
    """
    lint(program, name)
    for node in added:
        _check_sizes(program, name, node)
    check_tokens(program)
    for region in program.regions:
        inside = set(region.nodes)
        read = any(user not in inside for user in region.live_out.users)
        if not read and region.layer < len(program.regions) - 1:
            raise PassError(f"after {name}, nothing reads the hidden states of {region.path}")
        if program.segments and region.hidden not in tensor_inputs(region.nodes):
            raise PassError(
                f"after {name}, {region.path} does not read {program.describe(region.hidden)}"
            )


def check_tokens(program: "Program", *, complete: bool = False) -> None:
    """Compare the token set of every layer with the plan's.

    Args:
        complete: every segment of the plan must be there; otherwise a layer may still see the nearest
            ancestor of its own that passes have made.

    Raises:
        PassError: a layer runs on other tokens than planned, or is to attend to others than its rows.
    """
    made = {segment.name for segment in program.segments}
    for region, planned in zip(program.regions, program.plan.layers, strict=True):
        key = program.keys.get(region.layer, planned.query)
        if complete and program.kind != "decode" and key != planned.key:  # decode reads caches
            raise PassError(
                f"{region.path} is to run on the tokens of {planned.query} and attend to those of "
                f"{planned.key}, but attends to those of {key}; no pass lets it"
            )
        wanted: str | None = planned.query
        while wanted is not None and wanted not in made and not complete:
            wanted = program.plan.segment(wanted).parent
        found = program.segment_of(region.layer).name if made else None
        if found != wanted:
            raise PassError(
                f"{region.path} runs on the tokens of {found}, but the plan says {wanted}; the pass of an event "
                "must enter the segment that the event opens"
            )


def _check_sizes(program: "Program", name: str, node: fx.Node) -> None:
    if node.op == "get_attr":
        tensor = operator.attrgetter(str(node.target))(program.module)
        if isinstance(tensor, Tensor):
            program.symbols.declare_static(tensor.shape, f"{node.target}, which {name} adds,")
    for value in _constants((node.args, node.kwargs)):
        if program.symbols.is_symbolic(value):
            raise PassError(
                f"{name} writes the length {program.symbols.name(value)!r} into {program.describe(node)} as "
                "a number, which it is under shape inference alone; read it off a tensor when the program "
                "runs, as torch.ops.aten.sym_size.int(node, dim) does"
            )


def _constants(argument: Any) -> Iterator[int]:
    if isinstance(argument, tuple | list):
        for value in argument:
            yield from _constants(value)
    elif isinstance(argument, dict):
        yield from _constants(tuple(argument.values()))
    elif isinstance(argument, slice):
        yield from _constants((argument.start, argument.stop, argument.step))
    elif isinstance(argument, int):
        yield argument


def _remove_dead_code(program: "Program") -> None:
    # Passes to come read columns, also where no layer has positions.
    keep = program.effects | {s.columns for s in program.segments if s.columns is not None}
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.is_impure() or n in keep)
    alive = set(program.graph.nodes)
    for region in program.regions:
        region.nodes = sorted(n for n in region.nodes if n in alive)
    for branch in program.branches:
        for region in branch.regions:
            region.nodes = sorted(n for n in region.nodes if n in alive)
    program.subgraphs = {n: p for n, p in program.subgraphs.items() if n in alive}


def _adopt(program: "Program") -> None:
    """Take nodes between those of a layer, or of a subgraph, into it: each is compiled as a whole."""
    owner: dict[fx.Node, int | str] = dict(program.subgraphs)
    owner |= {node: region.layer for region in program.regions for node in region.nodes}
    free = [node for node in program.graph.nodes if node not in owner]
    reads: dict[fx.Node, set[int | str]] = {}
    feeds: dict[fx.Node, set[int | str]] = {}
    for node in free:
        before = {owner[n] for n in node.all_input_nodes if n in owner}
        reads[node] = before.union(*(reads.get(n, set()) for n in node.all_input_nodes))
    for node in reversed(free):
        behind = {owner[n] for n in node.users if n in owner}
        feeds[node] = behind.union(*(feeds.get(n, set()) for n in node.users))
        for unit in sorted(reads[node] & feeds[node], key=str):
            _take_in(program, node, unit)


def _take_in(program: "Program", node: fx.Node, unit: int | str) -> None:
    if isinstance(unit, str):
        program.subgraphs[node] = unit
        return
    region = program.regions[unit]
    region.nodes = sorted([*region.nodes, node])
    node.meta.setdefault("nn_module_stack", region.attention.meta.get("nn_module_stack"))
