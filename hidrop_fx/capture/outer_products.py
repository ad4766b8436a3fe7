"""Write a column times a row elementwise, which autocast leaves in fp32.

Before:  %matmul = matmul(%inv_freq, %positions)       # [B, d / 2, 1] @ [B, 1, S]
After:   %mul = mul(%inv_freq, %positions)

Rotary embeddings of older transformers multiply frequencies by positions so, within a region that leaves autocast.
The captured graph has no such regions, and a position above 256 is no 16-bit number.
"""

import torch
from torch import Tensor, fx

_PRODUCTS = (
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.mm.default,
)


def write_elementwise(graph: fx.Graph) -> None:
    """Replace each product of fp32 matrices whose inner dimension is one: the same numbers, term by term."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _PRODUCTS:
            continue
        column, row = node.args
        if not all(_is_fp32_matrix(side) for side in (column, row)):
            continue
        if column.meta["val"].shape[-1] == 1 and type(column.meta["val"].shape[-1]) is int:
            node.target = torch.ops.aten.mul.Tensor


def _is_fp32_matrix(side: fx.Node) -> bool:
    value = side.meta.get("val")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.dtype == torch.float32
