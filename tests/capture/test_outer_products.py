"""Rotary embeddings under autocast: positions stay fp32 numbers, as in transformers' own code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import hidrop_fx as hidrop
from hidrop_fx.capture.outer_products import write_elementwise
from tests.support.models import batch, tiny_llava

aten = torch.ops.aten


def traced(target: Any, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> fx.Graph:
    graph = fx.Graph()
    nodes = []
    for index, shape in enumerate(shapes):
        nodes.append(graph.placeholder(f"x{index}"))
        nodes[-1].meta["val"] = torch.empty(shape, dtype=dtype)
    graph.output(graph.call_function(target, tuple(nodes)))
    return graph


@pytest.mark.parametrize(
    ("target", "column", "row"),
    [
        (aten.matmul.default, (3, 8, 1), (3, 1, 700)),
        (aten.bmm.default, (3, 8, 1), (3, 1, 700)),
        (aten.mm.default, (8, 1), (1, 700)),
    ],
)
def test_a_column_times_a_row_is_the_same_number_elementwise(
    target: Any, column: tuple[int, ...], row: tuple[int, ...]
) -> None:
    graph = traced(target, column, row)
    inputs = torch.rand(column), torch.arange(700.0).expand(row).contiguous()
    expected = target(*inputs)
    write_elementwise(graph)
    run = fx.GraphModule(nn.Module(), graph)
    assert torch.equal(run(*inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(*inputs), expected)


@pytest.mark.parametrize(
    ("column", "dtype"), [((3, 8, 2), torch.float32), ((3, 8, 1), torch.bfloat16)]
)
def test_other_products_stay(column: tuple[int, ...], dtype: torch.dtype) -> None:
    graph = traced(aten.matmul.default, column, (3, column[-1], 5), dtype=dtype)
    write_elementwise(graph)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [aten.matmul.default]


@torch.no_grad()
@pytest.mark.parametrize("first", ["inside", "outside"])
def test_long_prompts_under_autocast_are_hf(first: str) -> None:
    """With positions that 16 bits do not hold."""
    hf = tiny_llava("llama", num_layers=2)
    model = hidrop.compile(tiny_llava("llama", num_layers=2), "identity", backend="eager")
    words: list[Any] = torch.randint(3, 90, (400,)).tolist()
    inputs: dict[str, Tensor] = batch(hf, [words])
    if first == "outside":
        model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**inputs).logits, hf(**inputs).logits)
