"""From measurements and a budget to a schedule: pyramids, budgets, the choice, the search."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidrop_fx import Schedule, ScheduleError
from hidrop_fx.analysis.choosing.budgets import Budget, budget_of, largest_level
from hidrop_fx.analysis.choosing.layer_choice import Choice, choose, filter_votes, local_minima
from hidrop_fx.analysis.choosing.pyramids import Pyramid, pyramids_for, solve
from hidrop_fx.analysis.data.typical_sample import TypicalSample
from hidrop_fx.analysis.measuring.attention_similarity import IlvasCurve
from hidrop_fx.analysis.measuring.sweeps import Sweep
from hidrop_fx.analysis.searching.local_search import local_search, neighbour, schedule_of
from hidrop_fx.cli.calibration_files import parse_budget
from hidrop_fx.planning import plan
from hidrop_fx.planning.geometry import Geometry
from hidrop_fx.schedule.pyramid import highest_level, pyramid

LLAVA = TypicalSample(
    geometry=Geometry(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32064,
        dtype_bytes=2,
    ),
    text_tokens=64,
    tokens_per_image=576,
    images=1,
)
CHOICE = Choice(
    inject=8, exit=24, filters=(10, 14, 16, 18), votes=(0.0,) * 32, reasons=("a", "b", "c")
)


def sweep(kl: list[float], first: int) -> Sweep:
    layers = tuple(range(first, first + len(kl)))
    return Sweep(layers=layers, kl=tuple(kl), accuracy=None, full_accuracy=None)


# Schedule.concave


@pytest.mark.parametrize(
    ("average", "filters", "head"),
    [(80, (10, 13, 16, 19), 453), (64, (10, 14, 16, 18), 215), (48, (10, 14, 16, 18), 87)],
)
def test_concave_gives_the_authors_lists(average: int, filters: tuple[int, ...], head: int) -> None:
    made = Schedule.concave(inject=8, exit=24, filters=filters, average=average)
    assert list(made.prune.values()) == [head, 10, 5, 1]
    assert made == Schedule.preset(f"hidrop-{average}")


@given(st.floats(42, 105), st.integers(1, 3))
def test_concave_is_the_nearest_head(average: float, tails: int) -> None:
    filters, tail = (10, 14, 16, 18)[: tails + 1], (10, 5, 1)[:tails]
    made = Schedule.concave(inject=8, exit=24, filters=filters, average=average, tail=tail)
    width = filters[1] - filters[0]
    found = LLAVA.plan(made).average_vision_tokens
    assert abs(found - average) <= width / 64 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average": 20}, r"out of reach.*average 38.38 to 109.12; put the first filter earlier"),
        ({"average": 300}, "put the first filter or the exit later"),
        ({"average": float("nan")}, "average=nan"),
        ({"average": float("inf")}, "average=inf"),
        ({"average": "64"}, "average='64'"),
        ({"tail": (5, 10, 1)}, "may not grow"),
        ({"tail": (10, 5)}, "2 in the tail need 3 filter layers"),
        ({"tail": (10, 5, 0)}, "tail=0"),
        ({"filters": (7, 14, 16, 18)}, "layers must ascend"),
        ({"filters": (14, 10, 16, 18)}, "layers must ascend"),
        ({"exit": 40}, "exit=40 but num_layers=32"),
        ({"exit": 18}, "layers must ascend"),
    ],
)
def test_concave_refuses_bad_arguments(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"inject": 8, "exit": 24, "filters": (10, 14, 16, 18), "average": 64}
    with pytest.raises(ScheduleError, match=message):
        Schedule.concave(**(good | options))


def test_concave_passes_positions_to_the_schedule() -> None:
    made = Schedule.concave(
        inject=8, exit=24, filters=(10, 14, 16, 18), average=64, positions="compact"
    )
    assert made.positions == "compact"


# Pyramids and levels


@given(
    st.lists(st.integers(1, 30), max_size=3).map(lambda v: tuple(sorted(v, reverse=True))),
    st.integers(1, 25),
)
def test_pyramids_grow_from_one_token_to_all(tail: tuple[int, ...], vision: int) -> None:
    levels = [pyramid(level, tail, vision) for level in range(1, highest_level(tail, vision) + 1)]
    assert set(levels[0]) == {1}
    assert set(levels[-1]) == {vision}
    for before, after in itertools.pairwise(levels):
        assert all(a <= b for a, b in zip(before, after, strict=True))
        assert before != after
        assert list(after) == sorted(after, reverse=True)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).map(sorted), st.integers(-1, 51))
def test_largest_level_is_the_last_that_costs_no_more(costs: list[int], limit: int) -> None:
    found = largest_level(lambda level: costs[level - 1], limit, len(costs))
    assert found == sum(cost <= limit for cost in costs)


@pytest.mark.parametrize("name", ["average_vision_tokens", "flops_share", "kv_share"])
def test_solved_schedules_are_exact_and_monotone(name: str) -> None:
    pyramid = Pyramid(
        inject=8, exit=24, filters=(10, 14, 16, 18), vision_tokens=576, tail=(10, 5, 1)
    )
    limits = [40, 48, 64, 80, 150, 280] if name.startswith("average") else [0.2, 0.22, 0.3, 0.5]
    before: tuple[int, ...] = (0,) * 32
    for limit in limits:
        budget = budget_of(LLAVA, **{name: limit})
        solved = solve(pyramid, budget)
        assert solved is not None
        level = next(n for n in range(1, pyramid.highest + 1) if pyramid.at(n) == solved)
        assert budget.cost(solved) <= limit
        beyond = next(
            (pyramid.at(n) for n in range(level, pyramid.highest + 1) if pyramid.at(n) != solved),
            None,
        )
        assert beyond is None or budget.cost(beyond) > limit
        tokens = LLAVA.plan(solved).vision_tokens
        assert all(a <= b for a, b in zip(before, tokens, strict=True))
        before = tokens


def test_the_solver_keeps_within_64_what_the_authors_round() -> None:
    pyramids, _ = pyramids_for(
        CHOICE, budget_of(LLAVA, average_vision_tokens=64), num_layers=32, vision_tokens=576
    )
    solved = solve(pyramids[0], budget_of(LLAVA, average_vision_tokens=64))
    assert solved == Schedule.preset("hidrop-64")
    within_80 = solve(
        Pyramid(inject=8, exit=24, filters=(10, 13, 16, 19), vision_tokens=576, tail=(10, 5, 1)),
        budget_of(LLAVA, average_vision_tokens=80),
    )
    assert within_80 is not None
    assert within_80.prune[10] == 452  # 453 is 80.03


def test_every_pyramid_offered_fits_the_budget() -> None:
    for limit in (20, 40, 64, 200):
        budget = budget_of(LLAVA, average_vision_tokens=limit)
        pyramids, reasons = pyramids_for(CHOICE, budget, num_layers=32, vision_tokens=576)
        assert reasons
        solved = [schedule for pyramid in pyramids if (schedule := solve(pyramid, budget))]
        assert solved
        for schedule in solved:
            schedule.validate(32)
            assert budget.allows(schedule)


def test_a_budget_that_needs_no_pruning_prunes_nothing() -> None:
    budget = budget_of(LLAVA, average_vision_tokens=288)
    pyramids, reasons = pyramids_for(CHOICE, budget, num_layers=32, vision_tokens=576)
    assert solve(pyramids[0], budget) == Schedule(inject=8, exit=24)
    assert "nothing needs to be pruned" in reasons[0]


def test_an_impossible_budget_says_what_the_least_costs() -> None:
    budget = budget_of(LLAVA, average_vision_tokens=0.4)
    with pytest.raises(ScheduleError, match=r"inject=8,prune=8:1,exit=24\) costs 0\.5"):
        pyramids_for(CHOICE, budget, num_layers=32, vision_tokens=576)


@pytest.mark.parametrize(
    ("given_budgets", "message"),
    [
        ({}, "exactly one budget"),
        ({"flops_share": 0.5, "kv_share": 0.5}, "got flops_share, kv_share"),
        ({"flops_share": 1.5}, r"lies in \(0, 1\]"),
        ({"average_vision_tokens": 0}, "use a number above 0"),
        ({"average_vision_tokens": float("nan")}, "use a number above 0"),
        ({"latency": 0.1}, "attach"),
    ],
)
def test_bad_budgets_are_refused(given_budgets: dict[str, float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        budget_of(LLAVA, **given_budgets)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", {"average_vision_tokens": 64.0}),
        ("average=16", {"average_vision_tokens": 16.0}),
        ("flops=.25", {"flops_share": 0.25}),
        ("kv = 0.3", {"kv_share": 0.3}),
        ("latency=5e-2", {"latency": 0.05}),
    ],
)
def test_budgets_parse_from_text(text: str, expected: dict[str, float]) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "tokens=3", "1.2.3", "flops=", "-4", "64 tokens"])
def test_bad_budget_text_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="cannot read the budget"):
        parse_budget(text)


# The choice


def curve(*values: float | None, window: int = 4, top: int = 5) -> IlvasCurve:
    return IlvasCurve(window=window, top=top, values=values)


def test_local_minima_are_inner_and_count_a_flat_bottom_once() -> None:
    assert local_minima([1, 3, 2, 2, 4, 1]) == [2]
    assert local_minima([3, 2, 1]) == []
    assert local_minima([None, 3, 1, 2]) == [2]


def test_votes_are_the_share_of_curves_that_reach_a_layer() -> None:
    curves = (curve(0, 2, 1, 3, 1), curve(0, 1, 2, 1, None), curve(3, 1, None, None, None))
    assert filter_votes(curves, 5) == (0, 1 / 3, 1 / 2, 1 / 2, 0)


def test_choice_takes_fusion_plateau_and_agreeing_maxima() -> None:
    made = choose(
        [0.99, 0.9, 0.99, 0.8, 0.95, 0.9, 0.99, 0.99],
        (curve(0, 0, 0, 0, 1, 0, 1, 0), curve(0, 0, 0, 0, 1, 0, 0, 0)),
        sweep([5, 4, 3, 2, 1, 0.05, 0.01, 0], 1),
        sweep([0, 0.01, 0.02, 0.05, 2, 3, 4, 5], 0),
        tolerance=0.02,
    )
    assert (made.inject, made.exit, made.filters) == (3, 6, (4,))
    assert "local minimum" in made.reasons[0]
    assert "plateau" not in made.reasons[1]
    assert "4 (100% of the curves)" in made.reasons[2]


def test_a_minimum_that_the_sweep_forbids_is_not_taken() -> None:
    similarity = [0.99, 0.9, 0.99, 0.8, 0.95, 0.99, 0.99, 0.99]
    exits = sweep([5, 4, 3, 2, 1, 0.05, 0.01, 0], 1)
    early = choose(similarity, (), exits, sweep([0, 0.01, 2, 3, 3, 3, 4, 5], 0), tolerance=0.02)
    assert early.inject == 1
    none = choose(similarity, (), exits, sweep([0, 2, 2, 3, 3, 3, 4, 5], 0), tolerance=0.02)
    assert none.inject == 0
    assert "injection sweep alone" in none.reasons[0]


def test_no_plateau_means_no_exit() -> None:
    made = choose([0.9] * 4, (), sweep([5, 4, 3, 0], 1), sweep([0, 5, 5, 5], 0), tolerance=0.02)
    assert made.exit == 4
    assert "no exit" in made.reasons[1]


def test_sweeps_without_damage_are_reported_to_decide_nothing() -> None:
    made = choose([0.9] * 4, (), sweep([0, 0, 0, 0], 1), sweep([0] * 4, 0), tolerance=0.02)
    assert "decide nothing" in made.reasons[0]
    damaged = choose([0.9] * 4, (), sweep([5, 4, 3, 0], 1), sweep([0, 5, 5, 5], 0), tolerance=0.02)
    assert not any("decide nothing" in reason for reason in damaged.reasons)


# The search


def counts_of(schedule: Schedule, num_layers: int, vision_tokens: int) -> tuple[int, ...]:
    """Vision tokens of one image by layer."""
    return plan(
        schedule,
        num_layers=num_layers,
        hidden_size=8,
        intermediate_size=8,
        vision_tokens=vision_tokens,
    ).vision_tokens


@given(st.integers(0, 10_000))
def test_neighbours_of_counts_are_valid_schedules_with_those_counts(seed: int) -> None:
    rng = random.Random(seed)
    counts = counts_of(Schedule.parse("inject=3,prune=4:32+5:10+7:1,exit=8"), 12, 144)
    assert counts == (0, 0, 0, 144, 32, 10, 10, 1, 0, 0, 0, 0)
    for _ in range(20):
        moved = neighbour(counts, 144, rng)
        if moved is not None:
            counts = moved
            made = schedule_of(counts, 144)
            made.validate(12)
            assert counts_of(made, 12, 144) == counts


def search(evaluations: int, seed: int = 0, loss: Any = None) -> tuple[Schedule, list[Schedule]]:
    """A landscape whose best schedule keeps more at layer 5."""
    tried: list[Schedule] = []

    def distance(schedule: Schedule) -> tuple[float]:
        tried.append(schedule)
        counts = counts_of(schedule, 8, 20)
        return (sum(abs(a - b) for a, b in zip(counts, (0, 0, 20, 9, 8, 8, 1, 0), strict=True)),)

    start = Schedule.parse("inject=2,prune=3:20+4:3+5:1,exit=7")
    allowance = sum(counts_of(start, 8, 20))
    budget = Budget(
        name="tokens",
        limit=allowance,
        unit="",
        cost=lambda s: float(sum(counts_of(s, 8, 20))),
    )
    best = local_search(
        start,
        counts=counts_of(start, 8, 20),
        vision_tokens=20,
        allowed=budget.allows,
        loss=loss or distance,
        evaluations=evaluations,
        seed=seed,
    )
    assert all(budget.allows(schedule) for schedule in tried)
    return best, tried


def test_the_search_improves_inside_its_budget_and_counts_its_evaluations() -> None:
    best, tried = search(60)
    assert len(tried) == 61
    assert len(set(tried)) == 61

    def distance(schedule: Schedule) -> int:
        counts = counts_of(schedule, 8, 20)
        return sum(abs(a - b) for a, b in zip(counts, (0, 0, 20, 9, 8, 8, 1, 0), strict=True))

    assert distance(best) < distance(tried[0])
    assert distance(best) == min(map(distance, tried))


def test_the_search_repeats_its_steps_and_continues_from_them() -> None:
    assert search(30)[1] == search(60)[1][:31]
    assert search(30, seed=1)[1] != search(30)[1]


def test_the_search_returns_its_start_where_nothing_is_better() -> None:
    best, _ = search(20, loss=lambda s: (0.0,))
    assert best == Schedule.parse("inject=2,prune=3:20+4:3+5:1,exit=7")
    assert search(0)[0] == best
