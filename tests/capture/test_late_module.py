"""A module that becomes Python when it is run: as torch's own, without its cost at each change."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import Any

import pytest
import torch
from torch import fx, nn

from hidrop_fx.capture.late_module import LateModule


@pytest.fixture
def late() -> Any:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    graph.output(graph.call_function(operator.add, (x, weight)))
    return LateModule({"weight": nn.Parameter(torch.full((2,), 3.0))}, graph, "Late")


def _multiply(module: Any) -> None:
    (node,) = [node for node in module.graph.nodes if node.op == "call_function"]
    node.target = operator.mul


def test_it_runs_reads_and_prints_as_a_graph_module(late: Any) -> None:
    plain = fx.GraphModule(late, late.graph, "Late")
    for module in (LateModule(late, late.graph, "Late"), late):
        assert str(module) == str(plain)
        assert module.code == plain.code
    x = torch.tensor([2.0, 5.0])
    assert late(x).tolist() == [5, 8]
    assert LateModule(late, late.graph).forward(x).tolist() == [5, 8]


def test_a_change_counts_from_recompile_on(late: Any) -> None:
    x = torch.tensor([2.0, 5.0])
    assert late(x).tolist() == [5, 8]
    _multiply(late)
    assert late(x).tolist() == [5, 8]
    late.recompile()
    assert "x * weight" in late.code
    assert late(x).tolist() == [6, 15]
    assert late.forward(x).tolist() == [6, 15]


def test_no_code_is_written_for_a_module_that_nobody_runs(
    late: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[fx.Graph] = []
    write = fx.Graph.python_code

    def counting(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        written.append(graph)
        return write(graph, *args, **kwargs)

    monkeypatch.setattr(fx.Graph, "python_code", counting)
    module = LateModule(late, late.graph)
    module.recompile()
    assert written == []
    module(torch.ones(2))
    module(torch.ones(2))
    assert written == [late.graph]


def test_copies_and_pickles_run_the_changed_graph(late: Any) -> None:
    x = torch.tensor([2.0, 5.0])
    late(x)
    _multiply(late)
    late.recompile()
    for twin in (copy.copy(late), copy.deepcopy(late), pickle.loads(pickle.dumps(late))):
        assert isinstance(twin, fx.GraphModule)
        assert twin(x).tolist() == [6, 15]
