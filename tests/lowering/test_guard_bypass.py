"""Calls of a body that need no look-up by guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import hidrop_fx as hidrop
from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.layer_body import Body
from tests.support.models import FIRST_WORD, IMAGE, batch, tiny_llava
from tests.support.runtimes import runtime_in


def without_lookup(body: Body, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the calls that still go through torch.compile."""
    lengths: list[int] = []
    run = body._run

    def counted(*args: Tensor) -> Any:
        lengths.append(args[0].shape[1])
        return run(*args)

    monkeypatch.setattr(body, "_run", counted)
    return lengths


def a_body(compiler: str = "aot_eager", **options: Any) -> tuple[Body, CompileLog]:
    graph = fx.Graph()
    states, weight = graph.placeholder("states"), graph.placeholder("weight")
    states.meta["symbolic_dims"] = (1,)
    product = graph.call_function(torch.matmul, (states, weight))
    graph.output((graph.call_function(torch.relu, (product,)), product))
    log = CompileLog()
    return Body("body", fx.GraphModule({}, graph), compiler, log, **options), log


def test_layers_of_one_length_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    body, log = a_body(bypass_guards=True)
    lengths = without_lookup(body, monkeypatch)
    weights = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    with torch.no_grad():
        for length in (5, 6, 5):
            for weight in weights:
                states = torch.randn(2, length, 8)
                product = states @ weight
                found = body(states, weight)
                assert torch.equal(found[0], product.relu())
                assert torch.equal(found[1], product)
    assert lengths == [5, 6]
    assert len(log.entries) == 1


def test_calls_of_another_kind_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    body, _ = a_body(bypass_guards=True)
    states, weight = torch.randn(2, 5, 8), nn.Parameter(torch.randn(8, 8))
    square = torch.randn(2, 8, 8)
    with torch.no_grad():
        body(states, weight)
        body(square, weight)
    lengths = without_lookup(body, monkeypatch)
    strided = torch.randn(5, 2, 8).transpose(0, 1)
    with torch.no_grad():
        assert torch.equal(body(strided, weight)[1], strided @ weight)
        assert torch.equal(body(states, weight.detach())[1], states @ weight)
        assert body(states.double(), weight.double())[1].dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert body(states, weight)[1].dtype == torch.bfloat16
        with torch.device("cpu"):
            body(states, weight)
    assert lengths == [5] * 5
    body(states, weight)[1].sum().backward()
    assert weight.grad is not None
    assert lengths == [5] * 6
    with torch.inference_mode():
        body(states.clone(), weight)
    assert lengths == [5] * 7


@pytest.mark.parametrize("twice_first", [False, True])
def test_one_tensor_in_two_places_is_looked_up(
    twice_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that is compiled for it serves no call with two, nor the other way round."""
    body, _ = a_body(bypass_guards=True)
    one, other = torch.randn(8, 8), torch.randn(8, 8)
    second = (other, one) if twice_first else (one, other)
    with torch.no_grad():
        body(one, second[1])
        lengths = without_lookup(body, monkeypatch)
        assert torch.equal(body(one, second[0])[1], one @ second[0])
    assert lengths == [8]


def test_what_may_be_remembered_differs_by_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    states, slots = graph.placeholder("states"), graph.placeholder("slots")
    states.meta["symbolic_dims"] = (1,)
    slots.meta["symbolic_dims"] = (0,)
    graph.output(graph.call_function(torch.index_select, (states, 1, slots)))
    body = Body("body", fx.GraphModule({}, graph), "aot_eager", CompileLog(), bypass_guards=True)
    states = torch.randn(2, 9)
    with torch.no_grad():
        for length in (4, 5):
            body(states, torch.arange(length))
        lengths = without_lookup(body, monkeypatch)
        for length in (4, 5, 4):
            assert torch.equal(body(states, torch.arange(length)), states[:, :length])
    assert lengths == []


def test_a_whole_prefill_is_looked_up_once_and_writes_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"schedule": "inject=1,prune=2:3", "lowering": "whole"}
    model = hidrop.compile(tiny_llava(), backend="aot_eager", **options)
    expected = hidrop.compile(tiny_llava(), backend="eager", **options)
    runtime = runtime_in(model)
    looked_up: list[int] = []
    for word in range(FIRST_WORD, FIRST_WORD + 3):
        inputs = batch(model, [[word, IMAGE, FIRST_WORD, word]])
        with torch.no_grad():
            found, wanted = (m(**inputs, logits_to_keep=1) for m in (model, expected))
        assert torch.equal(found.logits, wanted.logits)
        for ours, theirs in zip(
            found.past_key_values.layers, wanted.past_key_values.layers, strict=True
        ):
            assert torch.equal(ours.keys[:, :, : ours.filled], theirs.keys[:, :, : ours.filled])
            assert torch.equal(ours.values[:, :, : ours.filled], theirs.values[:, :, : ours.filled])
        if word == FIRST_WORD:
            (body,) = [
                b for b in runtime.programs.store.bodies.values() if b.name == "prefill program"
            ]
            looked_up = without_lookup(body, monkeypatch)
    assert looked_up == []


def test_a_body_that_may_write_is_always_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    body, _ = a_body()
    lengths = without_lookup(body, monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            body(torch.randn(2, 5, 8), torch.randn(8, 8))
    assert lengths == [5] * 3


def test_the_number_of_lengths_remembered_is_bounded() -> None:
    body, log = a_body(bypass_guards=True)
    weight = torch.randn(8, 8)
    with torch.no_grad():
        for length in range(2, 150):
            body(torch.randn(2, length, 8), weight)
    assert 1 <= len(body._bypasses) <= 64
    assert len(log.entries) <= 2
