"""Counts that learned ratios keep, and the budget term."""

from __future__ import annotations

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.planning.learned_keeps import kept_tokens
from hidrop_fx.training.ratios import Ratios
from tests.support.gradients import gradients_of_step
from tests.support.ratios import DTOPK, HARD, ROWS, supervised_batch, trained
from tests.support.runtimes import last_layout


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
