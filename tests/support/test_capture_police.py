"""The police of recordings can fail: each thing that a CUDA graph would not bear, in a pass of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

import hidrop_fx as hidrop
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.runtime.cuda_graphs import runner
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, PRUNED, batch, random_labels, tiny_llava

ELSEWHERE = torch.ones(32)
ROWS = [[5, IMAGE, 6], [7, 8]]


def when_it_runs(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function of real tensors that lets fake ones through: shapes are propagated by those."""

    @functools.wraps(function)
    def called(states: Tensor) -> Tensor:
        return states if isinstance(states, FakeTensor) else function(states)

    return called


@when_it_runs
def waits(states: Tensor) -> Tensor:
    return states + states.sum().item() * 0


@when_it_runs
def depends_on_data(states: Tensor) -> Tensor:
    return states + states.nonzero().sum() * 0


@when_it_runs
def indexes_by_mask(states: Tensor) -> Tensor:
    return states + states[states > 0].sum() * 0


def copies(states: Tensor) -> Tensor:
    return states * torch.tensor([1.0], device=states.device)


def reads_elsewhere(states: Tensor) -> Tensor:
    return states * ELSEWHERE


def behind_the_last_layer(function: Callable[[Tensor], Tensor]) -> Any:
    def put(program: Program, plan: Plan) -> PassResult:
        last: fx.Node = program.regions[-1].live_out
        users = list(last.users)
        with program.graph.inserting_after(last):
            new = program.graph.call_function(function, (last,))
        new.meta.update(last.meta)
        for user in users:
            user.replace_input_with(last, new)
        return PassResult(matched=1)

    return put


def graphed(**options: Any) -> Any:
    options = {"backend": "eager", "cuda_graphs": True} | options
    return hidrop.compile(tiny_llava("qwen2"), PRUNED, **options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (waits, "_local_scalar_dense: the host waits"),
        (depends_on_data, "nonzero: the host waits"),
        (indexes_by_mask, "by a mask"),
        (copies, "numbers of Python are copied"),
        (reads_elsewhere, "reads torch.float32 [32], which is no static input"),
    ],
)
def test_what_a_recorded_prefill_must_not_do_is_found(
    recordable: list[str], function: Any, message: str
) -> None:
    model = graphed(passes=[behind_the_last_layer(function)])
    new_tokens(model, batch(model, ROWS), 2)
    found = list(recordable)
    recordable.clear()
    assert any(text.startswith("prefill graph: ") and message in text for text in found), found


def test_what_a_recorded_backward_must_not_do_is_found(recordable: list[str]) -> None:
    @when_it_runs
    def checked(states: Tensor) -> Tensor:
        if states.requires_grad:
            states.register_hook(lambda grad: grad + grad.sum().item() * 0)
        return states

    model = graphed(passes=[behind_the_last_layer(checked)]).train()
    inputs = batch(model, ROWS)
    model(**inputs, labels=random_labels(inputs)).loss.backward()
    found = list(recordable)
    recordable.clear()
    assert any("train graph, backward: _local_scalar_dense" in text for text in found), found


def test_casts_that_autocast_keeps_are_found(
    recordable: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are freed with its region."""
    model = graphed()
    inputs = batch(model, ROWS)
    monkeypatch.setattr(runner, "_uncached_autocast", lambda _: nullcontext())
    with torch.autocast("cpu", torch.bfloat16):
        model.get_decoder().layers[0].self_attn.q_proj(torch.ones(1, 32))
        with torch.no_grad():
            model(**inputs)
    found = list(recordable)
    recordable.clear()
    assert any("reads torch.bfloat16" in text for text in found), found
