"""Let every decoder layer of a captured graph read its sizes off its own input.

Before:  %sym_size = sym_size(%inputs_embeds, 1)
         %view_9 = layers.1: view(%add_5, [%batch, %sym_size, 32])
After:   %sym_size_2 = layers.1: sym_size(%add_5, 1) ; %sym_size_3 = layers.1: sym_size(%add_5, 0)
         %view_9 = layers.1: view(%add_5, [%sym_size_3, %sym_size_2, 32])

Export computes batch and length once, from the embeddings. A layer that is to see other tokens must
not read the number of those; afterwards equal layers are equal functions of their tensors, too. What the
first layer makes of sizes, such as batch * length * experts of a token, every other layer makes anew.
"""

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from hidrop_fx.capture.regions import (
    describe,
    embeddings_of,
    layer_input,
    live_out_of,
    nodes_of_layers,
    tensor_inputs,
)
from hidrop_fx.errors import CaptureError

_SIZE = torch.ops.aten.sym_size.int


# Operators in front of the layers that treat every token alone, pointwise ones aside.
_TOKENWISE = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.to.dtype,
)


def normalise(graph: fx.Graph, layers: str, num_layers: int) -> None:
    """Replace every size that a layer reads from outside by the size of its own hidden states.

    Raises:
        CaptureError: a layer is missing, hands on more than its hidden states, or reads a size that does
            not follow from batch and length; tokens are mixed in front of the layers.
    """
    members = nodes_of_layers(graph, layers, num_layers)
    hidden = layer_input(graph, members[0])
    _check_tokenwise(hidden, embeddings_of(graph))
    for layer, nodes in enumerate(members):
        path = f"{layers}.{layer}"
        _Sizes(hidden, graph, path, nodes).own()
        if layer < num_layers - 1:
            hidden = live_out_of(path, nodes, numbers=True)
    _erase_unread_numbers(graph)
    for layer, nodes in enumerate(nodes_of_layers(graph, layers, num_layers)[:-1]):
        live_out_of(f"{layers}.{layer}", nodes)


def _erase_unread_numbers(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        value = node.meta.get("val")
        unread = node.op == "call_function" and not node.users
        if unread and isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            graph.erase_node(node)


def _check_tokenwise(hidden: fx.Node, embeds: fx.Node) -> None:
    """Raise unless each token's row in front of the layers depends on its own embedding alone."""
    pending = [hidden]
    while pending:
        node = pending.pop()
        if node is embeds or node.op == "get_attr":
            continue
        pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
        if not pointwise and node.target not in _TOKENWISE:
            raise CaptureError(
                f"in front of the layers, {describe(node)} may mix tokens; hidrop_fx lets text and vision "
                "tokens enter apart, so what a decoder does to its embeddings must be pointwise"
            )
        pending += node.all_input_nodes


class _Sizes:
    """The sizes that one layer reads, made from its own hidden states."""

    def __init__(self, hidden: fx.Node, graph: fx.Graph, path: str, nodes: list[fx.Node]) -> None:
        self._hidden, self._graph, self._path, self._nodes = hidden, graph, path, nodes
        self._first = self._top = nodes[0]
        self._made: dict[fx.Node, fx.Node] = {}

    def own(self) -> None:
        """Let the layer read no number from outside."""
        for source in tensor_inputs(self._nodes):
            if not isinstance(source.meta.get("val"), Tensor):
                self._own(source)
        inside = list(self._nodes)
        for source, own in self._made.items():
            for node in inside:
                node.replace_input_with(source, own)
        self._nodes[:0] = sorted(self._made.values())

    def _own(self, source: fx.Node) -> fx.Node:
        if source in self._made:
            return self._made[source]
        value, shape = source.meta.get("val"), self._hidden.meta["val"].shape
        dims = [d for d, size in enumerate(shape[:2]) if str(value) == str(size)]
        if not dims and not _is_arithmetic(source):
            raise CaptureError(
                f"{self._path} reads {describe(source)} = {value}, which is neither the batch size {shape[0]} "
                f"nor the length {shape[1]}; write it with sizes of the layer's own input"
            )
        if dims:
            with self._graph.inserting_before(self._top):
                own = self._top = self._graph.call_function(_SIZE, (self._hidden, dims[0]))
        else:
            args = fx.map_arg(source.args, self._own)
            with self._graph.inserting_before(self._first):
                own = self._graph.call_function(source.target, args)  # type: ignore[arg-type]
        own.meta.update(val=value, nn_module_stack=self._first.meta.get("nn_module_stack"))
        self._made[source] = own
        return own


def _is_arithmetic(node: fx.Node) -> bool:
    """Return True for a number made of numbers, such as batch * length."""
    inputs = node.all_input_nodes
    made = node.op == "call_function" and not node.kwargs and bool(inputs)
    return made and not any(isinstance(n.meta.get("val"), Tensor) for n in inputs)
