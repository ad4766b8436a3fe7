"""The graph of one of two processes that divide a decoder: its shapes, its collectives, and a model left as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from hidrop_fx.capture.parallel_styles import is_divided
from hidrop_fx.capture.tensor_parallel import divided_nodes
from hidrop_fx.ops.tensor_parallel import enter, gather, leave, part
from hidrop_fx.runtime.captures import capture_model
from tests.support.divided import GATHERED, divide, one_of_two
from tests.support.models import tiny_llava


def calls(graph: torch.fx.Graph) -> Counter[Any]:
    return Counter(
        node.target for node in graph.nodes if node.target in (enter, leave, gather, part)
    )


def test_a_layer_sums_twice_and_the_model_is_as_it_was() -> None:
    """Queries, keys and values enter together, as gate and up do; the norms of heads, whose gradients are sums, enter alone."""
    with one_of_two():
        model = divide(tiny_llava("qwen3", num_layers=2, kv_heads=2))
        decoder = model.get_decoder()
        before = [(m.__dict__.get("forward"), dict(m._parameters)) for m in model.modules()]
        found = capture_model(model)
        graph, processes = found.decoder.module.graph, found.decoder.processes
        assert calls(graph) == {enter: 2 * (2 + 2), leave: 2 * 2}
        assert [shape.heads for shape in found.kv_shapes] == [1, 1]
        assert processes is not None
        assert (processes.size, processes.rank, processes.joined) == (2, 0, "")
        own = divided_nodes(graph, processes.divided)
        assert next(n for n in graph.nodes if n.op == "output").args[0] not in own
        captured = dict(found.decoder.module.named_parameters())
        assert all(
            captured[name] is p for name, p in decoder.named_parameters() if name in captured
        )
        assert before == [(m.__dict__.get("forward"), dict(m._parameters)) for m in model.modules()]
        assert is_divided(model)
    assert not is_divided(tiny_llava(num_layers=1))


def test_the_second_of_two_puts_its_part_behind_the_first() -> None:
    """Where a plan gathers heads and channels, every process has all of them, and takes its own again."""
    with one_of_two(rank=1):
        found = capture_model(divide(tiny_llava(num_layers=1), GATHERED))
        graph = found.decoder.module.graph
        assert calls(graph) == {enter: 2, leave: 2, gather: 3, part: 1}
        assert [shape.heads for shape in found.kv_shapes] == [4]
        places = {node.args[1:4] for node in graph.nodes if node.target is gather}
        assert places == {(2, 16, 0)}
        assert [n.args[1:4] for n in graph.nodes if n.target is part] == [(2, 16, 16)]
