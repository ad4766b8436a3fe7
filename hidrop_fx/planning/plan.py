"""A plan: a schedule resolved for a depth, as data.

    plan = Plan.of(Schedule.preset("hidrop-64"), num_layers=32)
    plan.events          # inject_8, prune_10, prune_14, prune_16, prune_18, exit_24
    plan.segments        # text (layers 0-7), inject_8 (8-9), prune_10 (10-13), ...
    plan.layers[10]      # LayerTokens(query="prune_10", key="prune_10", cache="prune_10")

Structure alone: no model, no sample, no count of tokens. It is hashable, and the key of a program; what a
sample costs under it is `planning.costs`.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from hidrop_fx.planning.events import Event, events_of
from hidrop_fx.schedule.schedule import Schedule

__all__ = ["TEXT", "LayerTokens", "Plan", "Segment"]

TEXT = "text"
"""Name of the first segment: the text stream, which every plan begins with."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A set of tokens, and the run of layers that see it.

    Every event opens one. The run is empty (`start == stop`) where another event follows at the same
    layer, as a prune right at the injection: its tokens are scored, and no layer runs on them.
    """

    name: str
    """Name of the event that opens it, e.g. "prune_10"; "text" for the first."""
    start: int
    stop: int
    reason: str
    """Kind of the event that opens it; "text" for the first."""
    parent: str | None
    """The segment whose tokens it was made from; None for the first."""

    @property
    def layers(self) -> range:
        """The layers that run on it."""
        return range(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """Names of the segments whose tokens one layer works on."""

    query: str
    """Tokens that are its rows: they are attended from, and updated."""
    key: str
    """Tokens that are attended to."""
    cache: str
    """Tokens whose keys and values it keeps for decoding."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule resolved for a decoder of `num_layers` layers. Made by `Plan.of`."""

    schedule: Schedule
    num_layers: int
    events: tuple[Event, ...]
    """In the order in which a token meets them."""
    segments: tuple[Segment, ...]
    """The text stream, then one for each event."""
    layers: tuple[LayerTokens, ...]
    """One for each layer."""

    @staticmethod
    @lru_cache(maxsize=256)
    def of(schedule: Schedule, num_layers: int) -> "Plan":
        """Resolve a schedule for a depth.

        Raises:
            ScheduleError: an event lies outside the layers.
        """
        schedule.validate(num_layers)
        events = events_of(schedule, num_layers)
        segments = _segments(events, num_layers)
        rows = [segment.name for segment in segments for _ in segment.layers]
        read = list(rows)
        for layer in schedule.reads or ():
            read[layer] = events[0].name
        layers = tuple(
            LayerTokens(query=query, key=key, cache=key)
            for query, key in zip(rows, read, strict=True)
        )
        return Plan(
            schedule=schedule,
            num_layers=num_layers,
            events=events,
            segments=segments,
            layers=layers,
        )

    def of_kind(self, kind: str) -> tuple[Event, ...]:
        """Return the events of one kind, in order."""
        return tuple(event for event in self.events if event.kind == kind)

    def segment(self, name: str) -> Segment:
        """Return the segment of that name."""
        return self._by_name[name]

    def opened_by(self, event: Event) -> Segment:
        """Return the segment that an event opens."""
        return self._by_name[event.name]

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}


def _segments(events: tuple[Event, ...], num_layers: int) -> tuple[Segment, ...]:
    starts = [0, *(event.layer for event in events)]
    stops = [*starts[1:], num_layers]
    names = [TEXT, *(event.name for event in events)]
    reasons = [TEXT, *(event.kind for event in events)]
    parents = [None, *names[:-1]]
    return tuple(
        Segment(name=name, start=start, stop=stop, reason=reason, parent=parent)
        for name, start, stop, reason, parent in zip(
            names, starts, stops, reasons, parents, strict=True
        )
    )
