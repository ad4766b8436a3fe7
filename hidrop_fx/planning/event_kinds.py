"""Event kinds: what each kind of event leaves of a sample's vision tokens, and what it costs itself.

    EVENT_KINDS["prune"].vision_tokens(event, total=576, kept={10: 215})      # 215
    EVENT_KINDS["prune"].multiply_adds(event, geometry, before=640, after=279)

A kind is registered here by name; its pass stands in `passes/`, listed by `pipeline/event_passes.py`, and its
eager meaning in `reference/`. The three are found by the same name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hidrop_fx.errors import PassError
from hidrop_fx.methods import MERGES, SCORERS
from hidrop_fx.planning.events import Event
from hidrop_fx.planning.geometry import Geometry

__all__ = ["EVENT_KINDS", "EventKind", "register_event_kind"]


def _free(event: Event, geometry: Geometry, before: int, after: int) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class EventKind:
    """One kind of event, as plans, layouts and costs see it."""

    name: str
    vision_tokens: Callable[[Event, int, Mapping[int, int]], int]
    """Return how many vision tokens a sample has behind the event, from the event, the sample's vision
    tokens before anything is pruned, and the tokens left at each filter layer."""
    removes: bool
    """True if tokens leave: position rules that renumber do so behind it."""
    multiply_adds: Callable[[Event, Geometry, int, int], int] = _free
    """Return the multiply-adds of the event itself for one sample, from the event, the model's geometry,
    and the number of tokens before and after it."""


EVENT_KINDS: dict[str, EventKind] = {}
"""Registered kinds by name."""


def register_event_kind(kind: EventKind) -> EventKind:
    """Register a kind under its name.

    Raises:
        PassError: the name is taken by another kind.
    """
    if EVENT_KINDS.setdefault(kind.name, kind) is not kind:
        raise PassError(f"event kind {kind.name!r} is registered already; choose another name")
    return kind


def _scoring(event: Event, geometry: Geometry, before: int, after: int) -> int:
    """Count what the event's scorer, and its merge, add at its layer."""
    assert event.scorer is not None
    scorer, merge = SCORERS[event.scorer], event.option("merge")
    cost = scorer.multiply_adds(before, before - after, geometry)
    if merge is not None:
        cost += MERGES[str(merge)].multiply_adds(before, after, scorer, geometry)
    return cost


register_event_kind(
    EventKind(name="inject", vision_tokens=lambda event, total, kept: total, removes=False)
)
register_event_kind(
    EventKind(
        name="prune",
        vision_tokens=lambda event, total, kept: kept[event.layer],
        removes=True,
        multiply_adds=_scoring,
    )
)
register_event_kind(
    EventKind(name="exit", vision_tokens=lambda event, total, kept: 0, removes=True)
)
