"""Event kinds: one name stands for tokens and costs, a pass, and an eager meaning."""

from __future__ import annotations

import pytest

from hidrop_fx import PassError, Plan, Schedule
from hidrop_fx.pipeline.event_passes import EVENT_PASSES
from hidrop_fx.planning.event_kinds import EVENT_KINDS, EventKind, register_event_kind
from hidrop_fx.reference.eager_events import EAGER_EVENTS


def test_every_kind_has_a_pass_and_an_eager_meaning() -> None:
    assert list(EVENT_KINDS) == list(EVENT_PASSES) == list(EAGER_EVENTS)


def test_every_event_of_a_plan_is_of_a_registered_kind() -> None:
    plan = Plan.of(Schedule(inject=1, prune={2: 0.5, 3: 1}, exit=4), 6)
    assert {event.kind for event in plan.events} == set(EVENT_KINDS)


def test_a_taken_name_is_refused() -> None:
    other = EventKind(name="prune", vision_tokens=lambda event, total, kept: 0, removes=True)
    with pytest.raises(PassError, match="'prune' is registered already"):
        register_event_kind(other)
    assert EVENT_KINDS["prune"] is not other
