"""Plans as data: events, segments, and the token sets of each layer."""

from __future__ import annotations

import pickle

import pytest

from hidrop_fx import Event, LayerTokens, Plan, Schedule, ScheduleError, Segment

FULL = Schedule(inject=1, prune={2: 0.5, 3: 1}, exit=5)


def names(plan: Plan) -> list[str]:
    return [layer.query for layer in plan.layers]


def test_events_come_in_the_order_in_which_tokens_meet_them() -> None:
    plan = Plan.of(FULL, 6)
    assert [event.name for event in plan.events] == ["inject_1", "prune_2", "prune_3", "exit_5"]
    assert plan.events[1] == Event(
        layer=2,
        kind="prune",
        keep=0.5,
        scorer="last_token",
        selector="hard",
        options=(("rank", "hard"),),
    )


def test_segments_name_their_layers_and_their_parent() -> None:
    assert Plan.of(FULL, 6).segments == (
        Segment(name="text", start=0, stop=1, reason="text", parent=None),
        Segment(name="inject_1", start=1, stop=2, reason="inject", parent="text"),
        Segment(name="prune_2", start=2, stop=3, reason="prune", parent="inject_1"),
        Segment(name="prune_3", start=3, stop=5, reason="prune", parent="prune_2"),
        Segment(name="exit_5", start=5, stop=6, reason="exit", parent="prune_3"),
    )


def test_layers_name_the_segments_that_they_read_and_cache() -> None:
    plan = Plan.of(FULL, 6)
    assert names(plan) == ["text", "inject_1", "prune_2", "prune_3", "prune_3", "exit_5"]
    assert plan.layers[4] == LayerTokens(query="prune_3", key="prune_3", cache="prune_3")


def test_a_prune_at_the_injection_leaves_an_empty_run_between() -> None:
    plan = Plan.of(Schedule(inject=2, prune={2: 3}), 4)
    assert [len(segment.layers) for segment in plan.segments] == [2, 0, 2]
    assert names(plan) == ["text", "text", "prune_2", "prune_2"]
    assert plan.segment("prune_2").parent == "inject_2"


def test_the_identity_runs_on_what_the_injection_opens() -> None:
    plan = Plan.of(Schedule(), 3)
    assert names(plan) == ["inject_0"] * 3
    assert plan.segment("text").layers == range(0, 0)


@pytest.mark.parametrize("exit", [None, 4])
def test_an_exit_behind_the_last_layer_is_no_event(exit: int | None) -> None:
    plan = Plan.of(Schedule(prune={1: 2}, exit=exit), 4)
    assert not plan.of_kind("exit")


def test_equal_plans_are_one_key_and_survive_pickling() -> None:
    plan = Plan.of(FULL, 6)
    assert Plan.of(Schedule(inject=1, prune={2: 0.5, 3: 1}, exit=5), 6) == plan
    assert len({plan, pickle.loads(pickle.dumps(plan)), Plan.of(FULL, 7)}) == 2


def test_one_token_and_all_tokens_are_different_plans() -> None:
    assert Plan.of(Schedule(prune={1: 1}), 3) != Plan.of(Schedule(prune={1: 1.0}), 3)


def test_a_schedule_beyond_the_layers_is_refused() -> None:
    with pytest.raises(ScheduleError, match="prune layer 3 but the model has 3 layers"):
        Plan.of(Schedule(prune={3: 1}), 3)
