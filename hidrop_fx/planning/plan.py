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

__all__ = ["TEXT", "LayerCut", "LayerTokens", "Plan", "Segment", "Tail"]

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
    """Tokens whose keys and values it keeps for decoding; a `LayerCut` where the schedule cuts caches, a `Tail` where
    it convolves."""


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """The tokens of a segment that the cache of one layer keeps: each KV head its own, or all from a bottleneck on."""

    layer: int
    segment: str
    """The tokens that are chosen from: the layer's own."""
    like: str
    """The first cut that leaves as many tokens in every row; itself if it is the first."""

    @property
    def name(self) -> str:
        """Name of the tokens, e.g. "cut_3"."""
        return f"cut_{self.layer}"


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The last tokens of a segment, which are all that the cache of a convolution needs of it."""

    segment: str
    tokens: int
    """How many; of a row with fewer, all."""

    @property
    def name(self) -> str:
        """Name of the tokens, e.g. "tail_2_prune_10"."""
        return f"tail_{self.tokens}_{self.segment}"


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
    cuts: tuple[LayerCut, ...] = ()
    """One for each layer where the schedule cuts caches."""
    tails: tuple[Tail, ...] = ()
    """What the caches of convolutions keep, each once."""

    @staticmethod
    @lru_cache(maxsize=256)
    def of(schedule: Schedule, num_layers: int, kept: tuple[int, ...] = ()) -> "Plan":
        """Resolve a schedule for a depth.

        Args:
            kept: by layer, the last tokens of the prompt that its cache keeps where it convolves, 0 where it
                attends; empty where all layers do.

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
        cuts = _cuts(schedule, read)
        cached = [cut.name for cut in cuts] or list(_following(schedule, events, read))
        tails: dict[Tail, None] = {}
        for layer, tokens in enumerate(kept):
            if tokens:
                tail = Tail(segment=read[layer], tokens=tokens)
                tails[tail], cached[layer] = None, tail.name
        layers = tuple(
            LayerTokens(query=query, key=key, cache=held)
            for query, key, held in zip(rows, read, cached, strict=True)
        )
        return Plan(
            schedule=schedule,
            num_layers=num_layers,
            events=events,
            segments=segments,
            layers=layers,
            cuts=cuts,
            tails=tuple(tails),
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

    def cut_of(self, layer: int) -> LayerCut | None:
        """Return what a layer's cache keeps of its tokens; None for all of them."""
        return self.cuts[layer] if self.cuts else None

    def tail_of(self, layer: int) -> Tail | None:
        """Return what the cache of a convolution keeps of its tokens; None for layers that attend."""
        name = self.layers[layer].cache
        return next((tail for tail in self.tails if tail.name == name), None)

    def cached_like(self, layer: int) -> str:
        """Name the tokens by whose number a layer's cache is known: other layers' may have as many in every row."""
        return self.cuts[layer].like if self.cuts else self.layers[layer].cache

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}


def _following(schedule: Schedule, events: tuple[Event, ...], read: list[str]) -> list[str]:
    """Name what the cache of each layer holds: its own tokens, or those that outlive a later prune."""
    behind = schedule.retroactive
    if behind is None:
        return read
    (name,) = (e.name for e in events if e.kind == "prune" and e.layer == behind.layer)
    return [name if behind.first <= k < behind.layer else own for k, own in enumerate(read)]


def _cuts(schedule: Schedule, seen: list[str]) -> tuple[LayerCut, ...]:
    """Return the cut of each layer, which attends to the segments named; none where caches stay whole."""
    if schedule.cut is None and schedule.bottleneck is None:
        return ()
    first: dict[object, int] = {}
    found = []
    for layer, segment in enumerate(seen):
        by_layer = schedule.cut is not None and schedule.cut.rule.by_layer
        alike = layer if by_layer else segment
        like = first.setdefault(alike, layer)
        found.append(LayerCut(layer=layer, segment=segment, like=f"cut_{like}"))
    return tuple(found)


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
