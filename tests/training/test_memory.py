"""Training with less: recomputed layers, autocast, micro-batches, frozen parts and adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hidrop_fx as hidrop
from tests.support import counter
from tests.support.gradients import assert_gradients_close, gradients_of_step
from tests.support.models import IMAGE, PRUNED, supervised, tiny_llava
from tests.support.reference import reference_logits
from tests.support.runtimes import runtime_in

ROWS = [[5, 6, IMAGE, 7, 8, 9], [10, IMAGE, 11, 12, 13], [14, 15, 16, 17], [IMAGE, 18, 19, 20]]
supervised_batch = partial(supervised, rows=ROWS, label_seed=1, first_column=False)
LORA = {"r": 2, "target_modules": r".*language_model.*(q_proj|k_proj|up_proj)"}


@pytest.fixture(scope="module")
def _shared() -> Any:
    return hidrop.compile(tiny_llava(), PRUNED, backend="eager")


@pytest.fixture
def model(_shared: Any) -> Iterator[Any]:
    yield _shared.train()
    _shared.zero_grad(set_to_none=True)
    _shared.requires_grad_(True)


def reference_gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    logits = reference_logits(model, hidrop.Schedule.parse(PRUNED), inputs)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}


def saved_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """Of the activations that a forward keeps for backward, parameters left out."""
    model(**inputs)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**inputs)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


# Recomputation.


def test_checkpointing_after_compile_takes_effect_and_can_be_undone(model: Any) -> None:
    inputs = supervised_batch(model)
    plain, kept = gradients_of_step(model, inputs), saved_bytes(model, inputs)
    runtime = runtime_in(model)
    captures = dict(runtime.programs.captures)

    model.gradient_checkpointing_enable()
    try:
        assert saved_bytes(model, inputs) < 0.6 * kept
        recomputed = gradients_of_step(model, inputs)
    finally:
        model.gradient_checkpointing_disable()
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name
    assert saved_bytes(model, inputs) == kept
    assert runtime.programs.captures == captures, "the flag is read at every call; no new capture"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_before_compile_takes_effect(model: Any, reentrant: bool) -> None:
    """A checkpoint of either kind is an autograd function of torch's, which the trace runs through."""
    inputs = supervised_batch(model)
    plain, kept = gradients_of_step(model, inputs), saved_bytes(model, inputs)
    other = tiny_llava().train()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hidrop.compile(other, PRUNED, backend="eager").train()
    assert_gradients_close(gradients_of_step(other, inputs), plain, rel=1e-5)
    assert saved_bytes(other, inputs) < 0.6 * kept
    other.gradient_checkpointing_disable()
    assert saved_bytes(other, inputs) == kept


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_either_kind_with_frozen_inputs_gives_gradients(
    model: Any, reentrant: bool
) -> None:
    """Reentrant checkpoints of transformers' own would lose gradients where no input requires one."""
    inputs = supervised_batch(model)
    model.model.language_model.embed_tokens.requires_grad_(False)
    model.model.vision_tower.requires_grad_(False)
    plain = gradients_of_step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        assert_gradients_close(gradients_of_step(model, inputs), plain, rel=1e-6)
    finally:
        model.gradient_checkpointing_disable()


def test_checkpointing_in_eval_mode_does_nothing(model: Any) -> None:
    inputs = supervised_batch(model)
    model.eval()
    kept = saved_bytes(model, inputs)
    model.gradient_checkpointing_enable()
    try:
        assert saved_bytes(model, inputs) == kept
    finally:
        model.gradient_checkpointing_disable()


# Precision.


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_with_fp32_weights_gives_the_loss_and_gradients_of_hf(recompute: bool) -> None:
    """As transformers under the same autocast, to the rounding of bf16."""
    results = []
    for compiled in (True, False):
        model = tiny_llava(num_layers=2).train()
        if compiled:
            hidrop.compile(model, "identity", backend="eager")
        if recompute:
            model.gradient_checkpointing_enable()
        inputs = supervised_batch(model, rows=[[5, 6, IMAGE, 7, 8, 9]])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert {g.dtype for g in found.values()} == {torch.float32}
        results.append((loss.detach(), found))
    (ours, found), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.02, name


# Steps.


def test_four_micro_batches_give_the_gradients_of_one_batch(model: Any) -> None:
    inputs = supervised_batch(model)
    items = (inputs["labels"][:, 1:] != -100).sum()
    whole = gradients_of_step(model, inputs)
    model.zero_grad(set_to_none=True)
    image = 0
    for b, row in enumerate(ROWS):
        micro = {k: v[b : b + 1] for k, v in inputs.items() if k != "pixel_values"}
        if IMAGE in row:
            micro["pixel_values"] = inputs["pixel_values"][image : image + 1]
            image += 1
        model(**micro, num_items_in_batch=items).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_gradients_close(found, whole)


def test_clipping_sees_the_gradients_of_the_reference(model: Any) -> None:
    inputs = supervised_batch(model)
    expected = torch.stack([g.norm() for g in reference_gradients(model, inputs).values()]).norm()
    gradients_of_step(model, inputs)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
    clipped = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-3, atol=0)


# Frozen parts.


def _projector_alone(model: Any) -> None:
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)


def _vision_frozen(model: Any) -> None:
    model.model.vision_tower.requires_grad_(False)


@pytest.mark.parametrize("freeze", [_projector_alone, _vision_frozen])
def test_frozen_parts_get_no_gradient(model: Any, freeze: Callable[[Any], None]) -> None:
    inputs = supervised_batch(model)
    everything = saved_bytes(model, inputs)
    freeze(model)
    found = gradients_of_step(model, inputs)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() <= trained
    assert_gradients_close(found, reference_gradients(model, inputs))
    assert saved_bytes(model, inputs) < everything


def test_layers_before_injection_keep_nothing_for_a_projector() -> None:
    """Text alone goes through them, and nothing that made it is trained."""
    model: Any = hidrop.compile(tiny_llava(num_layers=2), "inject=1", backend="eager").train()
    _projector_alone(model)
    inputs = supervised_batch(model)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] != 20, -100)
    gradients_of_step(model, inputs)
    runtime = runtime_in(model)
    asked: list[bool] = []
    bodies = list(runtime.programs.store.bodies.values())
    runs = [body._run for body in bodies]
    for body, run in zip(bodies, runs, strict=True):
        body._run = lambda *args, run=run: asked.append(args[0].requires_grad) or run(*args)
    try:
        gradients_of_step(model, inputs)
    finally:
        for body, run in zip(bodies, runs, strict=True):
            body._run = run
    assert asked[0] is False
    assert asked[-1] is True


# Adapters.


@pytest.mark.parametrize("schedule", ["identity", PRUNED])
def test_adapters_before_and_after_compile_are_the_same(schedule: str) -> None:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    config = peft.LoraConfig(**LORA, init_lora_weights=False)

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(model, copy.deepcopy(config)).train()

    before = hidrop.compile(adapted(tiny_llava()), schedule, backend="eager")
    after = adapted(hidrop.compile(tiny_llava(), schedule, backend="eager"))
    models = [before, after, adapted(tiny_llava())]
    if schedule != "identity":
        models.pop()
    losses = []
    for model in models:
        inputs = supervised_batch(model.get_base_model())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][2] != losses[0][0]
    for other in models[1:]:
        for (name, mine), theirs in zip(
            models[0].named_parameters(), other.parameters(), strict=True
        ):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert losses[0] == pytest.approx(losses[-1], rel=1e-5)


def test_adapters_with_recomputation_and_frozen_inputs_get_gradients() -> None:
    peft = pytest.importorskip("peft", reason="peft, an optional dependency, is not installed")
    model = peft.get_peft_model(tiny_llava(), peft.LoraConfig(**LORA, init_lora_weights=False))
    hidrop.compile(model, PRUNED, backend="eager").train()
    inputs = supervised_batch(model.get_base_model())
    plain = gradients_of_step(model, inputs)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert all("lora" in name for name in plain)
    assert_gradients_close(gradients_of_step(model, inputs), plain, rel=1e-5)


def test_evaluation_between_steps_makes_nothing_anew(model: Any) -> None:
    inputs = supervised_batch(model)

    def step_and_evaluate(evaluation: AbstractContextManager[Any]) -> None:
        gradients_of_step(model.train(), inputs)
        with evaluation:
            model.eval()(**inputs)

    step_and_evaluate(nullcontext())
    with counter.expect(captures=0, programs=0):
        for evaluation in (torch.no_grad(), nullcontext(), torch.no_grad()):
            step_and_evaluate(evaluation)
