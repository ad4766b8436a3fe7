"""Training through Inductor: the gradients of the uncompiled programs, and no compilation after the first steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support import counter
from tests.support.gradients import assert_gradients_close, step
from tests.support.models import (
    FIRST_WORD,
    IMAGE,
    IMAGE_TOKEN,
    supervised,
    tiny_llava,
)
from tests.support.runtimes import runtime_in

SCHEDULE = "inject=1,prune=1:6,selection=dtopk"
STEPS, SETTLING = 200, 13
MOST_ENTRIES = 8
"""Compilations of all: a plain layer, a filter layer and its scoring, each once or twice for what may be differentiated.
Batches of one row, which are compiled apart, are left out for the time they take."""


@pytest.fixture(scope="module")
def _models() -> tuple[Any, Any]:
    # Sizes that no length is equal to.
    options: dict[str, Any] = {"num_layers": 3, "hidden_size": 48}
    return tuple(
        hidrop.compile(tiny_llava(**options), SCHEDULE, backend=backend).train()
        for backend in ("inductor", "eager")
    )


@pytest.fixture
def models(_models: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    yield _models
    for model in _models:
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()


ROWS = [[5, 6, IMAGE, 7, 8, 9], [10, IMAGE, 11, 12, 13, IMAGE, 14]]


def test_inductor_gradients_are_those_of_the_eager_backend(models: tuple[Any, Any]) -> None:
    with counter.expect(fallbacks=0):
        (loss, found), (other, expected) = (step(m, supervised(m, ROWS, spans=4)) for m in models)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    assert_gradients_close(found, expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("constant", [False, True])
def test_inductor_gradients_behind_a_prompt_are_those_of_the_eager_backend(constant: bool) -> None:
    """Also after the cache has been written to again: nothing that a backward needs lies in its buffers."""
    found = []
    for backend in ("inductor", "eager"):
        model: Any = hidrop.compile(tiny_llava(num_layers=2), "prune=1:6", backend=backend)
        inputs = {k: v for k, v in supervised(model, ROWS).items() if k != "labels"}
        with torch.set_grad_enabled(not constant), counter.expect(fallbacks=0):
            cache = model(**inputs).past_key_values
        new = torch.tensor([[11, 12], [13, 14]])
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
        total = torch.zeros(())
        with counter.expect(fallbacks=0):
            for _ in range(2):
                given = {"input_ids": new, "attention_mask": mask, "past_key_values": cache}
                total = total + model(**given).logits.log_softmax(-1)[..., 5].sum()
                mask = torch.cat([mask, torch.ones_like(new)], dim=1)
            with torch.no_grad():
                cache.crop(-2)
                cache.batch_select_indices(torch.tensor([1, 0]))
                model(input_ids=new[:, :1], past_key_values=cache)
        total.backward()
        named = model.named_parameters()
        found.append((total.detach(), {n: p.grad for n, p in named if p.grad is not None}))
    (ours, gradients), (total, expected) = found
    torch.testing.assert_close(ours, total, rtol=1e-4, atol=1e-4)
    assert_gradients_close(gradients, expected, rel=1e-3)


@pytest.mark.slow
def test_train_layers_share_bodies(models: tuple[Any, Any]) -> None:
    runtime = runtime_in(models[0])
    step(models[0], supervised(models[0], ROWS, spans=4))
    used = {
        b.name: b.used_by
        for b in runtime.programs.store.bodies.values()
        if b.name.startswith("train")
    }
    assert sorted(len(users) for users in used.values()) == [1, 1, 2], used


def test_switching_recomputation_compiles_nothing(models: tuple[Any, Any]) -> None:
    model = models[0]
    inputs = supervised(model, ROWS, spans=4)
    _, plain = step(model, inputs)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    with counter.expect(compiled=0):
        model.gradient_checkpointing_enable()
        _, recomputed = step(model, inputs)
        assert_gradients_close(recomputed, plain, rel=1e-3)
        model.gradient_checkpointing_disable()
        step(model, inputs)


def test_two_hundred_mixed_steps_compile_nothing_after_the_first(models: tuple[Any, Any]) -> None:
    """Lengths, image counts, rows with and without images, and the learned ratio change all the time."""
    model, draw = models[0], random.Random(0)
    runtime, kept = runtime_of(model), set()
    assert runtime is not None

    def train_on_drawn_rows(number: int) -> None:
        rows = []
        for _ in range(draw.choice([2, 3])):
            row: list[Any] = [
                draw.randrange(FIRST_WORD, IMAGE_TOKEN) for _ in range(draw.randrange(4, 30))
            ]
            for _ in range(draw.choice([0, 1, 1, 2])):
                row.insert(draw.randrange(len(row) - 2), IMAGE)
            rows.append(row)
        with torch.no_grad():
            model.hidrop_ratios.values.fill_(draw.uniform(0.05, 0.9))
        step(model, supervised(model, rows, seed=number, label_seed=number, spans=4))
        assert runtime.last_layout is not None
        kept.update(runtime.last_layout.vision_counts["prune_1"])

    for number in range(SETTLING):
        train_on_drawn_rows(number)
    with counter.expect(compiled=0):
        for number in range(SETTLING, STEPS):
            train_on_drawn_rows(number)
    assert len(kept) > 8
    assert len(runtime.programs.log.entries) <= MOST_ENTRIES, runtime.programs.log.entries
    assert not runtime.programs.log.fallbacks


def test_activation_memory_budget_reaches_the_partitioner() -> None:
    """Of a layer of which next to nothing may be kept, less is kept, and gradients stay."""
    sizes, found = [], []
    for budget in (None, 0.1):
        model: Any = tiny_llava(num_layers=1, hidden_size=48)
        hidrop.compile(model, "identity", activation_memory_budget=budget, backend="aot_eager")
        inputs = supervised(model.train(), ROWS, spans=4)
        found.append(step(model, inputs)[1])
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            model(**inputs)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        sizes.append(sum(storages.values()))
    assert sizes[1] < 0.9 * sizes[0]
    assert_gradients_close(found[1], found[0], rel=1e-3)


def test_activation_memory_budget_out_of_range_is_refused() -> None:
    for budget in (0, -0.1, 1.5):
        with pytest.raises(hidrop.HidropError, match=r"activation_memory_budget"):
            hidrop.compile(tiny_llava(num_layers=2), "identity", activation_memory_budget=budget)
