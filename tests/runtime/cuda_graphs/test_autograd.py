"""Autograd around recorded training: hooks, gradients that are asked for, second backwards, frozen parts, modes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.errors import HidropError
from tests.support import counter
from tests.support.models import IMAGE, batch, random_labels, tiny_llava
from tests.support.runtimes import graph_runner

SCHEDULE = "inject=1,prune=1:6+2:3,exit=3"
LAYER = "model.language_model.layers.1.mlp.up_proj.weight"
Models = tuple[Any, Any]


@pytest.fixture(scope="module")
def shared() -> Models:
    """A model that runs plainly, and the same one on graphs."""

    def made(graphs: bool) -> Any:
        model = tiny_llava("qwen2")
        options: dict[str, Any] = {"cuda_graphs": True, "bucket_multiple": 16} if graphs else {}
        return hidrop.compile(model, SCHEDULE, backend="eager", **options).train()

    return made(False), made(True)


@pytest.fixture
def models(shared: Models) -> Any:
    yield shared
    for model in shared:
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
    graph_runner(shared[1]).release()


def inputs_of(model: Any, seed: int = 0, word: int = 7) -> dict[str, Tensor]:
    inputs = batch(
        model, [[5, 6, IMAGE, word, 8, 9], [8, IMAGE, 9, word]], padding="right", seed=seed
    )
    return inputs | {"labels": random_labels(inputs, seed=seed)}


def gradient(model: Any, *inputs: dict[str, Tensor], name: str = LAYER) -> Tensor:
    """Accumulate the gradient of one parameter over calls."""
    model.zero_grad(set_to_none=True)
    for each in inputs:
        model(**each).loss.backward()
    found = model.get_parameter(name).grad.clone()
    model.zero_grad(set_to_none=True)
    return found


def double(grad: Tensor) -> Tensor:
    return grad * 2


def first_column(grad: Tensor) -> Tensor:
    return torch.cat([grad[:, :1], torch.zeros_like(grad[:, 1:])], dim=1)


@pytest.mark.parametrize("hook", [double, first_column])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_hook_on_a_parameter_runs_once_a_backward(
    models: Models, hook: Callable[[Tensor], Tensor], steps: int
) -> None:
    """Scaling and masking, recorded while the hook is there, with and without a gradient to add to."""
    calls = 0

    def counted(grad: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return hook(grad)

    plain, graphed = models
    inputs = [inputs_of(plain, seed) for seed in range(steps)]
    found = []
    for model in (plain, graphed):
        handle = model.get_parameter(LAYER).register_hook(counted)
        found.append(gradient(model, *inputs))
        handle.remove()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert calls == 2 * steps


def test_accumulate_hooks_and_prehooks_see_the_calls_alone(models: Models) -> None:
    _, graphed = models
    inputs, calls = inputs_of(graphed), []
    parameter = graphed.get_parameter(LAYER)
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda _: calls.append("after")),
        node.register_prehook(lambda _: calls.append("before")),
    ]
    gradient(graphed, inputs)
    gradient(graphed, inputs)
    for handle in handles:
        handle.remove()
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("has_grad", [False, True])
def test_gradients_that_were_asked_for_outlive_the_next_replay(
    models: Models, has_grad: bool
) -> None:
    """`torch.autograd.grad` beside an accumulated gradient: what it returned is its caller's."""
    plain, graphed = models
    first, second = inputs_of(plain, 0), inputs_of(plain, 1)
    parameter = graphed.get_parameter(LAYER)
    if has_grad:
        graphed(**first).loss.backward()
    (found,) = torch.autograd.grad(graphed(**first).loss, [parameter])
    kept = found.clone()
    graphed(**second).loss.backward()
    assert torch.equal(found, kept)
    torch.testing.assert_close(found, gradient(plain, first), rtol=1e-4, atol=1e-5)


def test_a_hook_keeps_what_it_was_given(models: Models) -> None:
    _, graphed = models
    seen: list[Tensor] = []
    handle = graphed.get_parameter(LAYER).register_hook(seen.append)
    for seed in (0, 1):
        graphed(**inputs_of(graphed, seed)).loss.backward()
    handle.remove()
    alone = [gradient(graphed, inputs_of(graphed, seed)) for seed in (0, 1)]
    torch.testing.assert_close(seen, alone, rtol=1e-5, atol=1e-6)


def test_a_second_backward_is_refused(models: Models) -> None:
    """Its replay would read activations whose memory the first one's took."""
    _, graphed = models
    inputs = inputs_of(graphed)
    loss = graphed(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(HidropError, match=r"second backward(.|\n)*Add the losses up"):
        loss.backward()
    del loss
    graphed.zero_grad()
    with counter.expect(recorded=0):
        graphed(**inputs).loss.backward()


def test_a_second_backward_of_one_part_is_refused(models: Models) -> None:
    """Two losses on one forward, each with a backward of its own."""
    _, graphed = models
    output = graphed(**inputs_of(graphed))
    output.loss.backward(retain_graph=True)
    with pytest.raises(HidropError, match="second backward"):
        output.logits.float().square().mean().backward()


def test_a_gradient_of_a_gradient_is_refused(models: Models) -> None:
    _, graphed = models
    parameter = graphed.get_parameter(LAYER)
    loss = graphed(**inputs_of(graphed)).loss
    (found,) = torch.autograd.grad(loss, [parameter], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        found.square().sum().backward()


def frozen_decoder(model: Any) -> None:
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)


def one_layer(model: Any) -> None:
    model.requires_grad_(False)
    model.get_parameter(LAYER).requires_grad_(True)


def everything(model: Any) -> None:
    model.requires_grad_(True)


@pytest.mark.parametrize(
    "stages",
    [
        (frozen_decoder, everything),
        (everything, frozen_decoder, everything),
        (frozen_decoder, one_layer, frozen_decoder),
    ],
)
def test_what_is_frozen_may_change_between_steps(models: Models, stages: Any) -> None:
    plain, graphed = models
    inputs = inputs_of(plain)
    for stage in stages:
        grads = []
        for model in (plain, graphed):
            stage(model)
            model.zero_grad(set_to_none=True)
            model(**inputs).loss.backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        assert grads[1].keys() == grads[0].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_stages_that_come_again_are_not_recorded_again(models: Models) -> None:
    _, graphed = models
    inputs = inputs_of(graphed)
    for stage in (frozen_decoder, everything):
        stage(graphed)
        graphed(**inputs).loss.backward()
    with counter.expect(recorded=0):
        for stage in (frozen_decoder, everything):
            stage(graphed)
            graphed(**inputs).loss.backward()


def test_steps_under_autocast_cast_the_weights_as_they_are(models: Models) -> None:
    """Autocast keeps its copies of the weights until the region ends; an optimizer may step before."""
    _, graphed = models
    inputs = inputs_of(graphed)
    parameter, losses = graphed.get_parameter(LAYER), []
    before = parameter.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            loss = graphed(**inputs).loss
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                parameter.mul_(3)
        assert torch.is_autocast_cache_enabled()
    with torch.no_grad():
        parameter.copy_(before)
    assert abs(losses[0] - losses[1]) > 1e-3


def save_on_cpu() -> Any:
    return torch.autograd.graph.save_on_cpu()


def offload() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)


def anomaly() -> Any:
    return torch.autograd.detect_anomaly(check_nan=True)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", [save_on_cpu, offload, anomaly])
def test_modes_that_look_into_a_backward_run_without_a_graph(
    models: Models, mode: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain, graphed = models
    inputs = inputs_of(plain)
    expected = gradient(plain, inputs)
    with (
        caplog.at_level(logging.INFO, logger="hidrop_fx"),
        counter.expect(recorded=0),
        mode(),
    ):
        found = gradient(graphed, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "runs without a graph" in caplog.text
    with counter.expect(recorded=1):
        gradient(graphed, inputs)


def test_a_recording_that_fails_as_the_plain_run_does_is_tried_again(models: Models) -> None:
    _, graphed = models
    inputs = inputs_of(graphed)
    attempts = graph_runner(graphed)
    decoder_norm = graphed.get_parameter("model.language_model.norm.weight")
    held, decoder_norm.data = decoder_norm.data, decoder_norm.data.new_ones(3)
    with pytest.raises(RuntimeError, match="must match the size"):
        graphed(**inputs)
    decoder_norm.data = held
    with counter.expect(recorded=1):
        graphed(**inputs).loss.backward()
    assert not attempts._refused
