"""The mask of a ratio and its gradient, and those of a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hidrop_fx as hidrop
from hidrop_fx.ops import tokens
from tests.support.gradients import gradients_of_step
from tests.support.ratios import HARD, supervised_batch, trained
from tests.support.reference import Reference, split_batch

SCORES = torch.tensor(
    [[0.11, 0.0, 0.42, 0.05, 0.31, 0.23, 0.0], [0.3, 0.0, 0.1, 0.2, 0.0, 0.0, 0.0]]
)


IS_VISION = torch.tensor([[1, 0, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0, 0]]).bool()


COLUMNS = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 6, 6, 6]])


def mask_of(scores: Tensor, ratio: Tensor, soft: bool) -> Tensor:
    return tokens.survival_mask(scores, COLUMNS, IS_VISION, ratio, soft)


def written_out(scores: Tensor, ratio: float, units: list[float] | None) -> Tensor:
    """The paper's formula in fp64, token by token; `units` of the soft ranks, None for hard ones."""
    mask = torch.ones(scores.shape, dtype=torch.float64)
    for b, row in enumerate(scores.double()):
        places = [i for i in range(6) if IS_VISION[b, i]]
        for i in places:
            above = row[i] - row[places]
            steps = above.ge(0).double() if units is None else torch.sigmoid(above / units[b])
            mask[b, i] = torch.sigmoid((steps.mean() - ratio) * len(places))
    return mask


def units_of(scores: Tensor) -> list[float]:
    """A tenth of the standard deviation of each row's scores."""
    spreads = [scores[b][IS_VISION[b]].double().std(correction=0) for b in range(2)]
    return [0.1 * float(spread) for spread in spreads]


@pytest.mark.parametrize("soft", [False, True])
def test_the_mask_is_the_formula_of_the_paper(soft: bool) -> None:
    units = units_of(SCORES) if soft else None
    for ratio in (0.0, 0.4, 0.9):
        mask = mask_of(SCORES, torch.tensor(ratio), soft)
        torch.testing.assert_close(mask.double(), written_out(SCORES, ratio, units))


@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_of_a_ratio_is_the_finite_difference(soft: bool) -> None:
    weights = torch.randn(SCORES.shape)
    ratio = torch.tensor(0.4, requires_grad=True)
    (mask_of(SCORES, ratio, soft) * weights).sum().backward()
    units, eps = units_of(SCORES) if soft else None, 1e-5
    up, down = (written_out(SCORES, 0.4 + d, units) * weights for d in (eps, -eps))
    assert ratio.grad is not None
    assert float(ratio.grad) == pytest.approx(float((up - down).sum()) / (2 * eps), rel=1e-4)


def test_the_gradient_of_soft_scores_is_the_finite_difference() -> None:
    """At the given unit: that the spread moves with the scores is left out on purpose."""
    weights = torch.randn(SCORES.shape)
    scores = SCORES.clone().requires_grad_()
    (mask_of(scores, torch.tensor(0.4), True) * weights).sum().backward()
    units, eps = units_of(SCORES), 1e-6
    expected = torch.zeros_like(SCORES)
    for b, i in IS_VISION.nonzero().tolist():
        step = torch.zeros(SCORES.shape, dtype=torch.float64)
        step[b, i] = eps
        up, down = (written_out(SCORES.double() + s, 0.4, units) * weights for s in (step, -step))
        expected[b, i] = float((up - down).sum()) / (2 * eps)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-3, atol=1e-4)


def test_hard_ranks_give_scores_no_gradient() -> None:
    scores = SCORES.clone().requires_grad_()
    mask = mask_of(scores, torch.tensor(0.4, requires_grad=True), False)
    assert torch.autograd.grad(mask.sum(), scores, allow_unused=True) == (None,)


def test_equal_scores_have_soft_ranks_without_nan() -> None:
    scores = torch.zeros_like(SCORES).requires_grad_()
    mask = mask_of(scores, torch.tensor(0.5), True)
    mask.sum().backward()
    assert mask.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_the_gate_is_one_with_the_gradient_of_the_survivors_mask() -> None:
    mask = torch.rand(2, 7, requires_grad=True)
    index = torch.tensor([[0, 2, 5], [1, 3, 6]])
    weights = torch.randn(2, 3)
    gate = tokens.survival_gate(mask, index)
    assert torch.equal(gate, torch.ones(2, 3))
    (gate * weights).sum().backward()
    torch.testing.assert_close(mask.grad, torch.zeros(2, 7).scatter(1, index, weights))


def test_a_gate_multiplies_states_and_values_token_by_token() -> None:
    gate = torch.rand(2, 3)
    states, values = torch.randn(2, 3, 4), torch.randn(2, 5, 3, 4)
    gated_states, gated_values = tokens.gate_states(states, gate), tokens.gate_values(values, gate)
    for b in range(2):
        for t in range(3):
            assert torch.equal(gated_states[b, t], states[b, t] * gate[b, t])
            assert torch.equal(gated_values[b, :, t], values[b, :, t] * gate[b, t])


def loss_of_reference_rows(
    model: Any, schedule: str, inputs: dict[str, Any], gate_of: Any = None
) -> tuple[Tensor, list[Any]]:
    """The loss of the reference, and its rows with their gates; `schedule` keeps fixed counts."""
    reference = Reference(model, hidrop.Schedule.parse(schedule))
    reference.gate_of = gate_of
    results, terms = [], []
    for row in split_batch(model, inputs):
        assert row.labels is not None
        result = reference.prefill(row.input_ids, row.features, row.labels)
        results.append(result)
        full = result.logits.new_zeros(result.length, result.logits.shape[1])
        full = full.index_copy(0, torch.tensor(result.surviving), result.logits)
        targets = row.labels[1:]
        terms.append(
            cross_entropy(full[:-1][targets != -100], targets[targets != -100], reduction="none")
        )
    return torch.cat(terms).mean(), results


def normalised_ranks(cut: Any, soft: bool) -> Tensor:
    """c' of every candidate of a cut."""
    scores, count = cut.scores, len(cut.candidates)
    if not soft:
        order = scores.argsort(descending=True, stable=True).tolist()
        return torch.tensor([(count - order.index(i)) / count for i in range(count)])
    unit = 0.1 * scores.detach().std(correction=0)
    return torch.sigmoid((scores[:, None] - scores[None, :]) / unit).mean(dim=1)


def survivors_masks(cut: Any, ratio: Tensor, soft: bool) -> Tensor:
    count = len(cut.candidates)
    mask = torch.sigmoid((normalised_ranks(cut, soft) - ratio) * count)
    return mask[[cut.candidates.index(c) for c in cut.kept]]


def mask_slopes(cut: Any, ratio: float) -> Tensor:
    """d mask / d ratio of each survivor of a cut."""
    value = torch.tensor(ratio, requires_grad=True)
    masks = survivors_masks(cut, value, soft=False)
    slopes = [torch.autograd.grad(m, value, retain_graph=True)[0] for m in masks]
    return torch.stack(slopes)


# The last filter layer before the exit too: its norm is blind to a factor on its input, its values are not.
FILTERS = ("prune=0:6+1:3", "prune=1:6+2:3,exit=3", "inject=1,prune=1:4,exit=2")


@pytest.mark.parametrize("positions", ["persistent", "compact"])
@pytest.mark.parametrize("filters", FILTERS)
def test_a_ratio_gets_the_gradient_of_the_survivors_gates(filters: str, positions: str) -> None:
    """d loss / d ratio = sum over survivors of (d loss / d gate) * (d mask / d ratio), layer by layer."""
    schedule = f"{filters},positions={positions}"
    model = trained(f"{schedule},selection=dtopk")
    inputs = supervised_batch(model)
    ours = gradients_of_step(model, inputs)["hidrop_ratios.values"]
    loss, rows = loss_of_reference_rows(model, schedule, inputs)
    expected = torch.zeros(len(ours))
    for index, (k, ratio) in enumerate(model.hidrop_ratios.numbers().items()):
        for row in (row for row in rows if row.gates):
            (slopes,) = torch.autograd.grad(loss, row.gates[k], retain_graph=True)
            expected[index] += (mask_slopes(row.cuts[k], ratio) * slopes).sum()
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("filters", FILTERS)
def test_the_gradient_of_each_ratio_is_a_finite_difference_of_the_loss(filters: str) -> None:
    """Of the reference's loss, with every survivor weighted by its mask, while the choice stays."""
    model = trained(f"{filters},selection=dtopk")
    inputs = supervised_batch(model)
    ours = gradients_of_step(model, inputs)["hidrop_ratios.values"]
    for index, (layer, ratio) in enumerate(model.hidrop_ratios.numbers().items()):

        def loss_at(step: float, layer: int = layer, ratio: float = ratio) -> float:
            def gate(k: int, cut: Any) -> Tensor:
                moved = step * mask_slopes(cut, ratio) if k == layer else 0.0
                return torch.ones(len(cut.kept)) + moved

            return float(loss_of_reference_rows(model, filters, inputs, gate)[0].detach())

        eps = 1e-3
        expected = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
        assert float(ours[index]) == pytest.approx(expected, rel=1e-2, abs=2e-4)
        assert abs(expected) > 1e-2


def test_hard_ranks_leave_every_other_gradient_alone() -> None:
    hard, learned = trained(HARD), trained()
    expected, found = (gradients_of_step(m, supervised_batch(m)) for m in (hard, learned))
    found.pop("hidrop_ratios.values")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_soft_ranks_give_gradient_to_queries_and_keys() -> None:
    """Every parameter's gradient is that of loss + sum of (d loss / d gate) * mask(scores)."""
    schedule = "prune=1:4"
    model = trained(f"{schedule},selection=dtopk,rank=soft")
    inputs = supervised_batch(model)
    ours = gradients_of_step(model, inputs)

    loss, rows = loss_of_reference_rows(model, f"{schedule},selection=dtopk,rank=soft", inputs)
    rows = [row for row in rows if row.gates]
    slopes = torch.autograd.grad(loss, [row.gates[1] for row in rows], retain_graph=True)
    ratio = model.hidrop_ratios.values[0]
    masks = [survivors_masks(row.cuts[1], ratio, soft=True) for row in rows]
    surrogate = sum((m * s).sum() for m, s in zip(masks, slopes, strict=True))
    names = [n for n, _ in model.named_parameters() if n in ours]
    parameters = [p for n, p in model.named_parameters() if n in ours]
    through = torch.autograd.grad(surrogate, parameters, retain_graph=True, allow_unused=True)
    plain = torch.autograd.grad(loss, parameters, allow_unused=True)
    for projection in ("q_proj", "k_proj"):
        name = f"model.language_model.layers.1.self_attn.{projection}.weight"
        extra = through[names.index(name)]
        assert extra is not None
        assert extra.abs().max() > 1e-3
    for name, *parts in zip(names, through, plain, strict=True):
        expected = torch.stack([part for part in parts if part is not None]).sum(0)
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            ours[name],
            expected,
            rtol=1e-3,
            atol=1e-4 * scale + 1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )
