"""A decoder whose weights transformers' tensor parallelism divides: how it is told, what is refused, what a trace is shown.

    with shown_own_parts(decoder):       # plain parameters of this process's shapes; `tp_forward` gives way to marks
        captured = capture(decoder)

`from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto"))` makes DTensors of the parameters, and gives each
module of the plan an instance attribute `forward`. The graph that a trace makes of them is that of one process: its
heads, its channels, and two collectives a layer (`hidrop_fx.ops.tensor_parallel`). All processes run equal graphs.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.capture.parallel_styles import REPLICATED, Style, is_divided, style_of
from hidrop_fx.capture.quantised import is_distributed, is_quantised
from hidrop_fx.capture.regions import Region, describe
from hidrop_fx.capture.stand_ins import stand_in
from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.ops.tensor_parallel import MARKS, enter, gather, leave, part

_COLUMNS, _ROWS, _ALONE = "ColwiseParallel", "RowwiseParallel", "TensorParallelLayer"
_EXPERTS = "MoeExpertsParallel"
_Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that divide a decoder's weights, as one of them sees it."""

    group: str
    """Name of the process group."""
    rank: int
    """This process's place in it."""
    size: int
    divided: frozenset[str]
    """Paths of the parameters of which each holds a part."""
    joined: str = ""
    """A place where a gradient of a whole value would be a term of it; empty if there is none."""


def check_division(decoder: Any) -> None:
    """Raise where a decoder is divided in a way that no captured graph follows.

    Raises:
        UnsupportedModelError: names the module or the weight, and what to do instead.
    """
    embedding = set(map(id, decoder.get_input_embeddings().modules()))
    for path, module in decoder.named_modules():
        style = None if id(module) in embedding else style_of(module)
        if style is None:
            continue
        name = f"{path} ({type(module).__name__}) of the text decoder"
        if style.name not in (_COLUMNS, _ROWS, _EXPERTS, REPLICATED, _ALONE):
            raise UnsupportedModelError(
                f"{name} is divided by tensor parallelism in the style {style.name}, and hidrop_fx follows linear layers "
                "by columns or rows, experts whose channels are divided, and norms of heads. Load the model with a tp_plan without that rule, or shard "
                "it with fully_shard"
            )
        own = (getattr(p, "_local_tensor", None) for p in module._parameters.values())
        if getattr(module, "_hf_quantized_needs_local_tp", False) or any(map(is_quantised, own)):
            raise UnsupportedModelError(
                f"{name} has a quantised weight under tensor parallelism; use plain weights, or one process"
            )
        _check_heads(name, decoder.get_submodule(path.rpartition(".")[0]), module, style)
    _check_adapters(decoder)


def _check_heads(name: str, attention: Any, module: Any, style: Style) -> None:
    """Raise where processes would share a head."""
    width, size = getattr(attention, "head_dim", None), style.mesh.size()
    if style.name != _COLUMNS or width is None or _is_whole(style.style.output_layouts):
        return
    heads = module.out_features / width
    if heads >= 1 and heads % size:
        raise UnsupportedModelError(
            f"{name} makes {heads:g} heads of {width} channels, which {size} processes of tensor parallelism cannot share: "
            f"each must hold as many whole heads (num_key_value_heads, where queries share keys). Use tp_size=n with a number n that "
            f"divides {heads:g}, or fully_shard"
        )


def _check_adapters(decoder: Any) -> None:
    for path, module in decoder.named_modules():
        if type(module).__module__.startswith("peft.tuners.") and is_divided(module):
            raise UnsupportedModelError(
                f"{path} of the text decoder has an adapter of PEFT over weights that tensor parallelism divides, whose own "
                "weights are whole; merge the adapter before, or train it under fully_shard"
            )


# The trace.


@contextmanager
def shown_own_parts(decoder: Any) -> Iterator[None]:
    """Show plain parameters of the shapes that this process holds, which take no memory, and marks for collectives."""
    embedding = set(map(id, decoder.get_input_embeddings().modules()))
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in decoder.modules():
            values = module.__dict__
            if id(module) in embedding:
                continue
            style = style_of(module)
            if style is not None:
                undo.append((values, "forward", values["forward"]))
                values["forward"] = _traced(module, style)
            parameters = values["_parameters"]
            for name, parameter in list(parameters.items()):
                if parameter is not None and is_distributed(parameter):
                    undo.append((parameters, name, parameter))
                    parameters[name] = stand_in(parameter, shape=parameter._local_tensor.shape)
        yield
    finally:
        for values, name, value in reversed(undo):
            values[name] = value


def _traced(module: Any, style: Style) -> _Forward:
    """Return what a trace sees in the place of transformers' `tp_forward`."""
    group = style.mesh.get_group().group_name
    ops, original = torch.ops.hidrop, style.original
    if style.name == _ALONE:
        return original
    if style.name == REPLICATED:

        def replicated(*args: Any) -> Any:
            own = dict(module._parameters)
            try:
                for name, value in own.items():
                    module._parameters[name] = None if value is None else ops.tp_enter(value, group)
                return original(*args)
            finally:
                module._parameters.update(own)

        return replicated
    if style.name == _EXPERTS:

        def experts(states: Tensor, chosen: Tensor, weights: Tensor, *more: Any) -> Any:
            entered = ops.tp_enter(states, group), chosen, ops.tp_enter(weights, group)
            return ops.tp_leave(original(*entered, *more), group)

        return experts
    if style.name == _COLUMNS:
        start, stop = _extent(module.out_features, style.mesh)

        def columns(x: Tensor) -> Any:
            y = original(ops.tp_enter(x, group))
            if _is_whole(style.style.output_layouts):
                y = ops.tp_gather(y, y.dim() - 1, start, module.out_features - stop, group)
            return y

        return columns
    start, stop = _extent(module.in_features, style.mesh)

    def rows(x: Tensor) -> Any:
        if _is_whole(style.style.input_layouts):
            x = ops.tp_part(x, x.dim() - 1, start, stop - start, group)
        bias = module._parameters.get("bias")
        if bias is None:
            return ops.tp_leave(original(x), group)
        module._parameters["bias"] = None  # once, and not once a process
        try:
            return ops.tp_leave(original(x), group) + bias
        finally:
            module._parameters["bias"] = bias

    return rows


def _is_whole(layout: Any) -> bool:
    return type(layout).__name__ == "Replicate"


def _extent(total: int, mesh: Any) -> tuple[int, int]:
    """Return where this process's part of so many channels starts and ends, as DTensor cuts them."""
    each = -(-total // mesh.size())
    start = min(total, mesh.get_local_rank() * each)
    return start, min(total, start + each)


def processes_of(decoder: Any) -> Processes:
    """Return the processes that divide a decoder."""
    styles = (style_of(module) for module in decoder.modules())
    mesh = next(style.mesh for style in styles if style is not None)
    divided = (
        path
        for path, parameter in decoder.named_parameters(remove_duplicate=False)
        if any(hasattr(each, "dim") for each in getattr(parameter, "placements", ()))
    )
    return Processes(
        group=mesh.get_group().group_name,
        rank=mesh.get_local_rank(),
        size=mesh.size(),
        divided=frozenset(divided),
    )


# The graph.


def replace_marks(graph: fx.Graph) -> None:
    """Put functions in the place of marks; a value that several products read enters once, and its gradient is summed once."""
    entered: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.nodes:
        function = MARKS.get(node.target)
        if function is None:
            continue
        node.target = function
        if function is enter:
            first = entered.setdefault(node.args, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def put_back(module: fx.GraphModule, decoder: Any) -> None:
    """Give a captured graph the decoder's own parameters, which stand-ins were shown for."""
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for path, parameter in decoder.named_parameters(remove_duplicate=False):
        owner, _, name = path.rpartition(".")
        if is_distributed(parameter) and path in read:
            module.get_submodule(owner)._parameters[name] = parameter


def divided_nodes(graph: fx.Graph, divided: frozenset[str]) -> set[fx.Node]:
    """Return the nodes of which each process computes a part, or a term.

    Args:
        divided: paths of parameters that are.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            is_own = str(node.target) in divided
        else:
            is_own = node.target not in (leave, gather) and (
                node.target is part or not found.isdisjoint(node.all_input_nodes)
            )
        if is_own:
            found.add(node)
    return found


def joined_in(
    graph: fx.Graph, regions: list[Region], divided: frozenset[str], parameters: Collection[str]
) -> str:
    """Describe where a layer joins what a process holds with a whole value that has a gradient, and nothing sums it.

    Args:
        divided: paths of the parameters that are.
        parameters: paths of all that the decoder has.
    """
    own = divided_nodes(graph, divided)
    for region in regions:
        assert region.live_out not in own, f"{region.path} hands on a part of its hidden states"
        trained = {region.hidden}
        for node in region.nodes:
            if node in own and node.target is not part:
                for read in node.all_input_nodes:
                    whole = read not in own and read.target is not enter
                    if whole and (read in trained or str(read.target) in parameters):
                        return f"{describe(node)} joins heads or channels of one process with {describe(read)}"
            value = node.meta.get("val")
            follows = node.target is not enter and not trained.isdisjoint(node.all_input_nodes)
            if follows and isinstance(value, Tensor) and value.is_floating_point():
                trained.add(node)
    return ""
