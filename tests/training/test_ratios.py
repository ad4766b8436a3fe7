"""Differentiable top-k: its mask and gradients, the counts that follow the learned ratios, and what carries them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hidrop_fx as hidrop
from hidrop_fx.ops import tokens
from hidrop_fx.planning.keeps import kept_tokens
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.training.ratios import Ratios
from tests.support.gradients import gradients_of_step
from tests.support.models import IMAGE, supervised, tiny_llava
from tests.support.reference import Reference, split_batch
from tests.support.runtimes import last_layout

HARD = "inject=1,prune=1:6+2:3"
DTOPK = HARD + ",selection=dtopk"
SOFT = DTOPK + ",rank=soft"
ROWS = [[5, 6, IMAGE, 7, 8, 9, 10], [11, IMAGE, 12, 13, 14, 15], [16, 17, 18, 19]]
supervised_batch = partial(supervised, rows=ROWS, label_seed=3)


_MODELS: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def _as_they_were() -> Iterator[None]:
    yield
    for model, start in _MODELS.values():
        model.train().zero_grad(set_to_none=True)
        if start is not None:
            model.hidrop_ratios.values.data.copy_(start)


def trained(schedule: str = DTOPK, **options: Any) -> Any:
    """A model in train mode, for all tests to use: its ratios go back to their start after each."""
    key = (schedule, *options.items())
    if key not in _MODELS:
        model = new(schedule, **options)
        ratios = getattr(model, "hidrop_ratios", None)
        _MODELS[key] = model, None if ratios is None else ratios.values.detach().clone()
    return _MODELS[key][0]


def new(schedule: str = DTOPK, **options: Any) -> Any:
    return hidrop.compile(tiny_llava(num_layers=3, **options), schedule, backend="eager").train()


# The mask.

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


# The whole model.


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


# Counts.


@pytest.mark.parametrize(
    ("tokens_", "kept"),
    [(576, 215), (215, 10), (10, 5), (5, 1), (576, 453), (576, 87), (453, 10), (9, 9)],
)
def test_a_ratio_made_from_counts_gives_them_back(tokens_: int, kept: int) -> None:
    ratio = torch.tensor(1 - kept / tokens_, dtype=torch.float32)
    assert kept_tokens(tokens_, float(ratio)) == kept


@pytest.mark.parametrize("preset", ["hidrop-80", "hidrop-64", "hidrop-48"])
@pytest.mark.parametrize("images", [1, 3])
def test_a_preset_starts_with_its_own_counts(preset: str, images: int) -> None:
    schedule = hidrop.Schedule.preset(preset)
    sizes = {"num_layers": 32, "hidden_size": 64, "intermediate_size": 128, "vision_tokens": 576}
    ratios = Ratios(hidrop.plan(schedule, **sizes))
    alive = 576 * images
    for layer, count in schedule.keep_counts(alive, images).items():
        alive = kept_tokens(alive, ratios.numbers()[layer])
        assert alive == count
    assert float(ratios.penalty().detach()) == 0.0


@pytest.mark.parametrize("schedule", [HARD, "prune=0:4,positions=compact"])
def test_training_starts_with_the_counts_of_the_hard_selection(schedule: str) -> None:
    layouts, losses = [], []
    for model in (trained(schedule), trained(schedule + ",selection=dtopk")):
        losses.append(model(**supervised_batch(model)).loss.detach())
        layouts.append(last_layout(model))
    assert layouts[0].vision_counts == layouts[1].vision_counts
    assert losses[0] == losses[1]


def test_counts_follow_the_ratios_after_a_step() -> None:
    model = trained(DTOPK)
    inputs = supervised_batch(model)
    optimizer = torch.optim.SGD([model.hidrop_ratios.values], lr=1.0)
    model(**inputs)
    assert last_layout(model).vision_counts["prune_1"] == [6, 6, 0]
    assert last_layout(model).vision_counts["prune_2"] == [3, 3, 0]
    model.hidrop_ratios.values.grad = torch.tensor([-1 / 9, 0.3])  # 4/9 dropped, then 1/5
    optimizer.step()
    for mode in (True, False):
        model.train(mode)(**inputs)
        assert last_layout(model).vision_counts["prune_1"] == [5, 5, 0]
        assert last_layout(model).vision_counts["prune_2"] == [4, 4, 0]


def test_counts_follow_ratios_written_past_autograd() -> None:
    """As DeepSpeed and checkpoint loaders write parameters."""
    model = trained(DTOPK)
    model(**supervised_batch(model))
    model.hidrop_ratios.values.data.copy_(torch.tensor([8 / 9, 0.0]))
    model(**supervised_batch(model))
    assert last_layout(model).vision_counts["prune_1"] == [1, 1, 0]


def test_a_ratio_that_is_no_number_is_refused() -> None:
    model = trained(DTOPK)
    model.hidrop_ratios.values.data.copy_(torch.tensor([0.3, float("nan")]))
    with pytest.raises(hidrop.HidropError, match=r"ratio of filter layer 2 is nan.*hidrop_fx.load"):
        model(**supervised_batch(model))


@pytest.mark.parametrize(("ratio", "kept"), [(-0.5, 9), (0.0, 9), (1.0, 1), (1.7, 1)])
def test_a_ratio_beyond_its_range_keeps_all_or_one(ratio: float, kept: int) -> None:
    assert kept_tokens(9, ratio) == kept
    assert kept_tokens(0, ratio) == 0


def test_the_budget_term_pulls_the_average_back() -> None:
    model = trained(DTOPK + ",budget_weight=2.0")
    ratios = model.hidrop_ratios
    start = ratios.values.detach().clone()
    assert float(ratios.penalty().detach()) == 0.0

    # Vision tokens are seen by layer 1 (6 of 9) and layer 2 (3 of 9), and by none later.
    with torch.no_grad():
        ratios.values += torch.tensor([-0.1, 0.05])
    first = 1 - ratios.values[0].item()
    average = first + first * (1 - ratios.values[1].item())
    assert float(ratios.penalty().detach()) == pytest.approx(2.0 * (average - 1) ** 2, rel=1e-4)

    optimizer = torch.optim.SGD(ratios.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        ratios.penalty().backward()
        optimizer.step()
    assert float(ratios.penalty().detach()) < 1e-6
    assert not torch.allclose(ratios.values, start), "the average comes back, not each ratio"


def test_the_budget_term_is_in_the_training_loss_alone() -> None:
    model = trained(DTOPK)
    inputs = supervised_batch(model)
    without = float(model(**inputs).loss.detach())
    with torch.no_grad():
        model.hidrop_ratios.values += 0.004  # fewer than one token of nine
    penalty = float(model.hidrop_ratios.penalty().detach())
    assert penalty > 1e-5
    assert float(model(**inputs).loss.detach()) == pytest.approx(without + penalty, abs=2e-6)
    with torch.no_grad():
        assert float(model.eval()(**inputs).loss) == pytest.approx(without, abs=2e-6)


def test_the_budget_term_counts_once_over_accumulated_micro_batches() -> None:
    model = trained(DTOPK)
    with torch.no_grad():
        model.hidrop_ratios.values += torch.tensor([0.05, 0.02])
    rows = [ROWS[0], ROWS[0][:-1], ROWS[0], ROWS[0][:-2]]
    inputs = supervised_batch(model, rows=rows)
    inputs["num_items_in_batch"] = (inputs["labels"][:, 1:] != -100).sum()
    whole = gradients_of_step(model, inputs)["hidrop_ratios.values"]
    model.zero_grad(set_to_none=True)
    for b in range(4):
        pixels = inputs["pixel_values"][b : b + 1]
        part = {k: v[b : b + 1] for k, v in inputs.items() if v.dim() == 2}
        micro = part | {"pixel_values": pixels, "num_items_in_batch": inputs["num_items_in_batch"]}
        model(**micro).loss.backward()
    torch.testing.assert_close(model.hidrop_ratios.values.grad, whole, rtol=1e-4, atol=1e-6)


# What carries the ratios.


def test_the_state_dict_stays_that_of_the_class(tmp_path: Path) -> None:
    model, plain = new(DTOPK), tiny_llava(num_layers=3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert any(name == "hidrop_ratios.values" for name, _ in model.named_parameters())
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()]
)
def test_ratios_keep_fp32_and_their_value(cast: Callable[[Any], Any]) -> None:
    model = new(DTOPK)
    with torch.no_grad():
        model.hidrop_ratios.values.fill_(1 - 215 / 576)
    model.hidrop_ratios.values.grad = torch.full((2,), 1 / 3)
    before, values = model.hidrop_ratios.values.detach().clone(), model.hidrop_ratios.values
    cast(model)
    assert model.hidrop_ratios.values is values, "an optimizer holds this one"
    assert values.dtype == torch.float32
    assert torch.equal(values, before)
    assert values.grad is not None
    assert values.grad.dtype == torch.float32


def test_a_bf16_model_learns_ratios() -> None:
    model = trained(DTOPK, dtype=torch.bfloat16)
    inputs = supervised_batch(model)
    found = gradients_of_step(model, inputs)["hidrop_ratios.values"]
    assert found.dtype == torch.float32
    assert found.abs().min() > 0


def test_a_copy_learns_ratios_of_its_own() -> None:
    model = new(DTOPK)
    twin = copy.deepcopy(model)
    inputs = supervised_batch(model)
    with torch.no_grad():
        twin.hidrop_ratios.values += 1 / 9
    model(**inputs)
    twin(**inputs)
    assert runtime_of(twin) is not runtime_of(model)
    assert last_layout(model).vision_counts["prune_1"] == [6, 6, 0]
    assert last_layout(twin).vision_counts["prune_1"] == [5, 5, 0]
    assert gradients_of_step(twin, inputs).keys() == gradients_of_step(model, inputs).keys()
    hidrop.restore(twin)
    assert hidrop.is_compiled(model)
    assert not hasattr(twin, "hidrop_ratios")


def test_a_pickled_model_comes_back_compiled_with_its_ratios() -> None:
    model = new(DTOPK)
    with torch.no_grad():
        model.hidrop_ratios.values += 1 / 9
    twin = pickle.loads(pickle.dumps(model))
    inputs = supervised_batch(model)
    torch.testing.assert_close(twin(**inputs).loss, model(**inputs).loss, rtol=0, atol=0)
    assert last_layout(twin).vision_counts["prune_1"] == [5, 5, 0]


def test_restore_takes_the_ratios_out() -> None:
    model = new(DTOPK)
    hidrop.restore(model)
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in tiny_llava(num_layers=3).named_parameters()
    ]


def test_compiling_again_under_the_same_schedule_keeps_the_ratios(tmp_path: Path) -> None:
    model = new(DTOPK)
    values = model.hidrop_ratios.values
    values.data.copy_(torch.tensor([0.2, 0.6]))
    hidrop.save(model, tmp_path)
    hidrop.compile(model, DTOPK, backend="aot_eager")
    assert model.hidrop_ratios.values is values, "an optimizer holds this one"
    values.data.zero_()
    hidrop.load(model, tmp_path, backend="eager")
    assert model.hidrop_ratios.values is values
    assert torch.equal(values, torch.tensor([0.2, 0.6]))
    model(**supervised_batch(model))
    assert last_layout(model).vision_counts["prune_1"] == [8, 7, 0]


def test_compiling_again_under_another_schedule_drops_the_ratios_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = new(DTOPK)
    values = model.hidrop_ratios.values
    hidrop.compile(model, SOFT, backend="eager")
    assert "hidrop.save(model, directory) keeps them" in caplog.text
    assert model.hidrop_ratios.values is not values
    hidrop.compile(model, HARD, backend="eager")
    assert not hasattr(model, "hidrop_ratios")
