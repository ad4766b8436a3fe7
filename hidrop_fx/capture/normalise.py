"""Let every decoder layer of a captured graph read its sizes off its own input.

Before:  %sym_size = sym_size(%inputs_embeds, 1)
         %view_9 = layers.1: view(%add_5, [%batch, %sym_size, 32])
After:   %sym_size_2 = layers.1: sym_size(%add_5, 1) ; %sym_size_3 = layers.1: sym_size(%add_5, 0)
         %view_9 = layers.1: view(%add_5, [%sym_size_3, %sym_size_2, 32])

Export computes batch and length once, from the embeddings. A layer that is to see other tokens must
not read the number of those; afterwards equal layers are equal functions of their tensors, too.
"""

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import (
    describe,
    layer_input,
    live_out_of,
    nodes_of_layers,
    tensor_inputs,
)
from hidrop_fx.errors import CaptureError

_SIZE = torch.ops.aten.sym_size.int


def normalise(graph: fx.Graph, layers: str, num_layers: int) -> None:
    """Replace every size that a layer reads from outside by the size of its own hidden states.

    Raises:
        CaptureError: a layer is missing, hands on more than its hidden states, or reads a size that is
            neither batch nor length.
    """
    hidden = layer_input(graph)
    for layer, nodes in enumerate(nodes_of_layers(graph, layers, num_layers)):
        path = f"{layers}.{layer}"
        _read_sizes_from(hidden, graph, path, nodes)
        if layer < num_layers - 1:
            hidden = live_out_of(path, nodes)


def _read_sizes_from(hidden: fx.Node, graph: fx.Graph, path: str, nodes: list[fx.Node]) -> None:
    batch, length = hidden.meta["val"].shape[:2]
    for source in tensor_inputs(nodes):
        value = source.meta.get("val")
        if isinstance(value, Tensor):
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
