"""Head and loss a few rows at a time: the loss and every gradient are those of all logits at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

import hidrop_fx as hidrop
from hidrop_fx.models import family_of
from hidrop_fx.runtime.hf import fused_loss as fused_module
from hidrop_fx.training.fused_loss import summed_loss
from tests.models.test_families import labelled
from tests.support.families import CASES, make_batch
from tests.support.models import IMAGE, PRUNED, VOCAB, supervised, tiny_llava
from tests.support.packed import pack
from tests.support.reference import IGNORE
from tests.support.runtimes import compiled_eagerly

ROWS: list[list[int | str]] = [
    [5, 6, IMAGE, 7, 8, 9, 10],
    [11, IMAGE, 12, 13, IMAGE, 14, 15],
    [16, 17, 18, 19],
]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows at a time, so that a small batch has several parts and a shorter last one."""
    monkeypatch.setattr(fused_module, "summed_loss", partial(summed_loss, rows=3))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(num_layers=4).train()


def step(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Tensor]]:
    with compiled_eagerly(model, PRUNED, **options):
        model.zero_grad(set_to_none=True)
        output = model(**inputs)
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, grads


def compare(model: Any, inputs: dict[str, Any], tolerance: float = 1e-5) -> Any:
    wanted, expected = step(model, inputs)
    found, gradients = step(model, inputs, fused_loss=True)
    assert wanted.logits is not None
    assert found.logits is None
    assert torch.equal(found.logit_columns, wanted.logit_columns)
    torch.testing.assert_close(
        found.loss, wanted.loss, rtol=tolerance, atol=tolerance, equal_nan=True
    )
    assert gradients.keys() == expected.keys()
    largest = max(float(value.abs().nan_to_num().max()) for value in expected.values())
    for name, value in expected.items():
        scale = float(value.abs().nan_to_num().max()) if tolerance < 1e-4 else largest
        torch.testing.assert_close(
            gradients[name], value, rtol=tolerance, atol=tolerance * scale + 1e-7,
            equal_nan=True, msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip
    return found


ARGUMENTS: dict[str, dict[str, Any]] = {
    "the mean": {},
    "items of the step": {"num_items_in_batch": torch.tensor(11)},
    "a number of items": {"num_items_in_batch": 11},
    "another index": {"ignore_index": -7},
    "shifted labels": {"shift_labels": True},
    "nothing supervised": {"labels": None},
    "nothing supervised, with items": {"labels": None, "num_items_in_batch": torch.tensor(5)},
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_loss_and_gradients_are_those_of_all_logits(model: Any, what: str) -> None:
    inputs: dict[str, Any] = supervised(model, ROWS, first_column=False) | ARGUMENTS[what]
    labels = inputs["labels"]
    if labels is None:
        inputs["labels"] = torch.full_like(inputs["input_ids"], IGNORE)
    elif "ignore_index" in inputs:
        inputs["labels"] = labels.masked_fill(labels == IGNORE, -7)
    elif "shift_labels" in inputs:
        inputs["shift_labels"] = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    compare(model, inputs)


def test_packed_batches_have_it_too(model: Any) -> None:
    compare(model, pack(supervised(model, ROWS, first_column=False)))


@pytest.mark.parametrize(
    "kind", ["tied", "bias", "frozen", "only the head", "autocast", "adapters"]
)
def test_heads_of_every_kind(kind: str) -> None:
    model: Any = tiny_llava(num_layers=4).train()
    if kind == "tied, with a bias":
        model.lm_head.weight = model.get_input_embeddings().weight
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    elif kind == "frozen":
        model.lm_head.requires_grad_(False)
    elif kind == "only the head":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    elif kind == "adapters":
        lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, lora).train()
    inputs = supervised(tiny_llava(num_layers=1), ROWS, first_column=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        compare(model, inputs, 2e-2 if kind == "autocast" else 1e-5)


@pytest.mark.parametrize(
    "name", ["granite4_vision", pytest.param("gemma4", marks=pytest.mark.slow)]
)
def test_a_class_that_scales_or_caps_its_logits_does_so_in_each_part(name: str) -> None:
    case = CASES[name]
    model = case.make().train()
    assert family_of(model).logits is not None
    batch = make_batch(case, model, [[5, IMAGE, 6, 7, 8], [9, 10, 11, 12]], "right")
    inputs = batch.inputs | {"labels": labelled(batch)}
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss  # transformers'
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with compiled_eagerly(model, "identity", fused_loss=True):
        output = model(**inputs)
        output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-5)
    for name, value in wanted.items():
        found = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(
            found, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()) + 1e-6
        )


def test_learned_ratios_keep_their_term() -> None:
    model: Any = tiny_llava(num_layers=3).train()
    schedule = "inject=1,prune=1:0.5+2:0.25,selection=dtopk"
    inputs = supervised(model, ROWS, first_column=False)
    found = []
    for fused in (False, True):
        hidrop.compile(model, schedule, backend="eager", fused_loss=fused)
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), model.hidrop_ratios.values.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# What is there at a time.


class Largest(TorchDispatchMode):
    """The most values that an operator returned in one tensor."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, Tensor):
                self.most = max(self.most, value.numel())
        return found


def test_no_operator_returns_the_logits() -> None:
    """Neither forward nor backward; more rows than the model has values elsewhere."""
    hidden = torch.randn(600, 8, requires_grad=True)
    head = nn.Linear(8, 500)
    targets = torch.randint(500, (600,))

    def part(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(head(x), y, reduction="sum")

    with Largest() as fused:
        summed_loss(hidden, targets, part, list(head.parameters()), 50).backward()
    with Largest() as whole:
        part(hidden, targets).backward()
    assert whole.most == 600 * 500
    assert fused.most == 50 * 500


def test_gradients_in_16_bit_are_as_exact_as_of_one_product() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(512, 64, generator=generator), torch.randn(300, 64, generator=generator)
    targets = torch.randint(300, (512,), generator=generator)
    rows, table = (value.bfloat16() for value in drawn)

    def errors(x: Tensor, w: Tensor, size: int | None) -> tuple[float, ...]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()

        def part(a: Tensor, b: Tensor) -> Tensor:
            return cross_entropy(linear(a, w).float(), b, reduction="sum")

        loss = part(x, targets) if size is None else summed_loss(x, targets, part, [w], size)
        loss.backward()
        assert x.grad is not None
        assert w.grad is not None
        assert w.grad.dtype == w.dtype
        pairs = ((loss.detach(), exact[0]), (x.grad, exact[1]), (w.grad, exact[2]))
        return tuple(float((a.double() - b).norm() / b.norm()) for a, b in pairs)

    x, w = rows.double().requires_grad_(), table.double().requires_grad_()
    loss = cross_entropy(linear(x, w), targets, reduction="sum")
    exact = (loss.detach(), *torch.autograd.grad(loss, (x, w)))
    whole, parts = errors(rows, table, None), errors(rows, table, 16)
    for one, other in zip(parts, whole, strict=True):
        assert one <= 1.3 * other + 1e-6


# Calls that differ.


def test_a_second_backward_through_the_same_graph_gives_the_same(model: Any) -> None:
    inputs = supervised(model, ROWS, first_column=False)
    with compiled_eagerly(model, PRUNED, fused_loss=True):
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward(retain_graph=True)
        once = model.lm_head.weight.grad.clone()
        (loss * 2).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, 3 * once)


def test_logits_are_there_without_labels_in_eval_mode_and_without_gradients_none(
    model: Any,
) -> None:
    inputs = supervised(model, ROWS, first_column=False)
    bare = {name: value for name, value in inputs.items() if name != "labels"}
    with compiled_eagerly(model, PRUNED, fused_loss=True), torch.no_grad():
        assert model(**bare).logits is not None
        fused = model(**inputs)
        short = model(**inputs, return_dict=False)
        model.eval()
        try:
            whole = model(**inputs)
        finally:
            model.train()
    assert fused.logits is None
    assert short[0] == fused.loss
    assert whole.logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(fused.loss, whole.loss, rtol=1e-5, atol=1e-5)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "hidrop_fx"):
        yield caplog


def test_a_loss_function_of_the_users_own_gets_the_logits(
    model: Any, logged: pytest.LogCaptureFixture
) -> None:
    theirs = copy.deepcopy(model)

    def own(logits: Tensor, labels: Tensor, vocab_size: int, **given: Any) -> Tensor:
        return logits.square().mean()

    theirs.loss_function = own
    inputs = supervised(model, ROWS, first_column=False)
    output, _ = step(theirs, inputs, fused_loss=True)
    assert output.loss == output.logits.square().mean()
    assert "model.loss_function is" in logged.text


def test_float16_makes_its_logits(logged: pytest.LogCaptureFixture) -> None:
    model = tiny_llava(num_layers=4).half().train()
    inputs = supervised(model, ROWS, first_column=False)
    output, _ = step(model, inputs, fused_loss=True)
    assert output.logits is not None
    assert "float16" in logged.text


@pytest.mark.parametrize("distill", [None, "fast_from_full"])
def test_steps_of_two_schedules_make_logits_only_for_a_lesson(distill: str | None) -> None:
    losses = []
    for fused in (False, True):
        model: Any = tiny_llava(num_layers=4)
        named = {"fast": PRUNED, "full": "identity"}
        hidrop.compile(model, named, backend="eager", fused_loss=fused).train()
        inputs = supervised(model, ROWS, first_column=False)
        with hidrop.DualTraining(share=1.0, seed=1, distill=distill).step(model, 0):
            output = model(**inputs)
        output.loss.backward()
        losses.append((output.loss.detach(), model.lm_head.weight.grad))
        assert (output.logits is None) == (fused and distill is None)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
