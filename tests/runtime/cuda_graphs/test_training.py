"""Training on static buffers: the runner of CUDA graphs, by plain calls on a CPU and by graphs on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support import counter
from tests.support.devices import devices
from tests.support.models import IMAGE, batch, random_labels, tiny_llava
from tests.support.runtimes import runtime_in

SCHEDULE = "inject=1,prune=1:6+2:3,exit=3"
MULTIPLE = 16


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, bool], Any]:
    return {}


@pytest.fixture
def model_on(models: dict[tuple[str, bool], Any]) -> Iterator[Any]:
    def make(device: str, graphs: bool) -> Any:
        key = (device, graphs)
        if key not in models:
            model = tiny_llava("qwen2").to(device)
            models[key] = hidrop.compile(
                model,
                SCHEDULE,
                backend="eager",
                cuda_graphs=graphs,
                bucket_multiple=MULTIPLE,
            ).train()
        return models[key]

    yield make
    for model in models.values():
        model.zero_grad(set_to_none=True)
        if graphs := runner(model):
            graphs.release()


def runner(model: Any) -> GraphRunner | None:
    runtime = runtime_in(model)
    return runtime.graphs


def micro_batches(model: Any, device: str) -> list[dict[str, Tensor]]:
    """Other lengths and image counts; the first and the last fall into one entry."""
    rows: list[Any] = [
        [[5, 6, IMAGE, 7, 8, 9], [8, 9]],
        [[5, 6, 7, 8], [8, 9, 4]],
        [[5, 6, IMAGE, IMAGE, 7, 8, 9], [8, 9, IMAGE, 3]],
        [[5, 6, 7, IMAGE, 7], [8, IMAGE, 9, 4]],
    ]
    made = [batch(model, r, padding="right", seed=i) for i, r in enumerate(rows)]
    return [inputs | {"labels": random_labels(inputs, seed=i)} for i, inputs in enumerate(made)]


def accumulate(model: Any, batches: list[dict[str, Tensor]]) -> tuple[list[float], dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    losses = []
    for inputs in batches:
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return losses, grads


def assert_same(found: tuple[list[float], Any], expected: tuple[list[float], Any]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@devices
def test_four_micro_steps_accumulate_what_plain_calls_accumulate(
    model_on: Any, device: str
) -> None:
    plain, graphed = model_on(device, False), model_on(device, True)
    batches = micro_batches(plain, device)
    expected = accumulate(plain, batches)
    with counter.expect(recorded=3):
        assert_same(accumulate(graphed, batches), expected)
    with counter.expect(recorded=0):
        assert_same(accumulate(graphed, batches), expected)
    assert "3 recorded" in [e.cuda_graph[:10] for e in hidrop.inspect(graphed).executables]


def squares(states: Tensor) -> Tensor:
    return states.float().square().mean(dim=-1)


def return_squares(program: Program, plan: Plan) -> PassResult:
    """Text-only layers, the first and the last, tell the mean square of each state."""
    end, (first, *_, last) = program.graph.output_node(), program.regions
    added = {
        f"square_{r.layer}": program.call(squares, r.live_out, before=end) for r in (first, last)
    }
    program.returns({**program.outputs, **added})
    return PassResult(matched=len(added))


@devices
@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("wanted", [("square_0", "square_3"), ("square_0",)])
def test_outputs_of_a_custom_pass_carry_their_gradients(
    device: str, wanted: tuple[str, ...], with_loss: bool
) -> None:
    found = {}
    for graphs in (False, True):
        model = hidrop.compile(
            tiny_llava("qwen2").to(device),
            SCHEDULE,
            backend="eager",
            cuda_graphs=graphs,
            bucket_multiple=MULTIPLE,
            passes=[return_squares],
        ).train()
        losses = []
        for inputs in micro_batches(model, device)[:2] * 2:
            output = model(**inputs)
            real = output.logit_columns < inputs["input_ids"].shape[1]
            loss = sum((output.pass_outputs[name] * real).sum() / real.sum() for name in wanted)
            loss = loss + output.loss if with_loss else loss
            loss.backward()
            losses.append(loss.item())
        named = model.named_parameters()
        found[graphs] = losses, {n: p.grad for n, p in named if p.grad is not None}
    expected, carried = found[False][1], found[True][1]
    assert any(name.endswith("layers.0.mlp.down_proj.weight") for name in expected)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-6)
    for name, grad in expected.items():
        atol = 1e-5 + 1e-4 * float(grad.abs().max())
        torch.testing.assert_close(carried[name], grad, rtol=1e-3, atol=atol, msg=name)
    assert not any(bool(carried[name].any()) for name in carried.keys() - expected.keys())


@devices
def test_the_loss_outlives_the_next_replay(model_on: Any, device: str) -> None:
    model = model_on(device, True)
    first, *_, second = micro_batches(model, device)
    with torch.no_grad():
        kept = model(**first)
        loss, logits = kept.loss.item(), kept.logits.clone()
        model(**second)
    assert kept.loss.item() == loss
    assert torch.equal(kept.logits, logits)


@devices
def test_two_forwards_before_a_backward_give_plain_gradients(
    model_on: Any, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As contrastive losses do: the second one must not overwrite what the first one's backward needs."""
    plain, graphed = model_on(device, False), model_on(device, True)
    first, second, *_ = micro_batches(plain, device)
    expected = accumulate(plain, [first, second])[1]
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        total = graphed(**first).loss + graphed(**second).loss
    assert "before the first one's backward" in caplog.text
    total.backward()
    for name, grad in expected.items():
        found = graphed.get_parameter(name).grad
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_forward_without_backward_does_not_block_the_next(
    model_on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_on("cpu", True)
    first, *_ = micro_batches(model, "cpu")
    model(**first)
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        model(**first).loss.backward()
    assert "before the first one's backward" not in caplog.text


@devices
def test_graphs_read_parameters_that_the_optimizer_changed(model_on: Any, device: str) -> None:
    """Parameters change in place between replays."""
    plain, graphed = model_on(device, False), model_on(device, True)
    inputs, *_ = micro_batches(plain, device)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    losses = []
    for model in (plain, graphed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for _ in range(3):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.append(loss.item())
        losses.append(found)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(before[name])
    assert losses[0][0] != losses[0][2]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_graphs_of_moved_parameters_are_recorded_again(
    model_on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_on("cpu", True)
    inputs, *_ = micro_batches(model, "cpu")
    expected = accumulate(model, [inputs])
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()
    with caplog.at_level(logging.INFO, logger="hidrop_fx"), counter.expect(recorded=1):
        assert_same(accumulate(model, [inputs]), expected)
    assert "recorded again" in caplog.text


def test_the_least_recently_used_bucket_is_evicted(model_on: Any) -> None:
    model = model_on("cpu", True)
    graphs = runner(model)
    assert graphs is not None
    batches = micro_batches(model, "cpu")
    capacity, graphs.capacity = graphs.capacity, 2
    try:
        accumulate(model, batches[:3])
        kept = list(graphs.entries)
        accumulate(model, batches[1:2])
    finally:
        graphs.capacity = capacity
    assert len(kept) == 2
    assert list(graphs.entries) == kept[::-1]


def test_gradient_checkpointing_under_graphs_gives_plain_gradients(
    model_on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain, graphed = model_on("cpu", False), model_on("cpu", True)
    inputs, *_ = micro_batches(plain, "cpu")
    expected = accumulate(plain, [inputs])
    graphed.gradient_checkpointing_enable()
    try:
        with caplog.at_level(logging.INFO, logger="hidrop_fx"):
            assert_same(accumulate(graphed, [inputs] * 1), expected)
    finally:
        graphed.gradient_checkpointing_disable()
    assert caplog.text.count("runs without CUDA graphs") == 1


def test_frozen_parameters_get_no_gradient(model_on: Any) -> None:
    plain, graphed = model_on("cpu", False), model_on("cpu", True)
    inputs, *_ = micro_batches(plain, "cpu")
    found = []
    for model in (plain, graphed):
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        found.append(accumulate(model, [inputs]))
        model.requires_grad_(True)
    assert_same(found[1], found[0])
    assert all("projector" in name for name in found[1][1])


def test_learned_ratios_stay_within_a_bucket() -> None:
    schedule = f"{SCHEDULE},selection=dtopk"
    model = hidrop.compile(
        tiny_llava("llama"), schedule, backend="eager", cuda_graphs=True, bucket_multiple=MULTIPLE
    ).train()
    inputs, *_ = micro_batches(model, "cpu")
    accumulate(model, [inputs])
    kept = list(runtime_of(model).last_layout.counts["prune_1"])
    with torch.no_grad():
        model.hidrop_ratios.values[0] = 0.1
    with counter.expect(recorded=0):
        _, grads = accumulate(model, [inputs])
    assert list(runtime_of(model).last_layout.counts["prune_1"]) != kept
    assert grads["hidrop_ratios.values"].abs().max() > 0


def test_a_bad_bucket_multiple_is_refused() -> None:
    with pytest.raises(hidrop.HidropError, match="bucket_multiple=0"):
        hidrop.compile(tiny_llava(), SCHEDULE, bucket_multiple=0)
