"""The events of a schedule: what changes the set of tokens that layers see, and at which layer.

    events_of(Schedule.preset("hidrop-64"), 32)
    # (inject_8, prune_10, prune_14, prune_16, prune_18, exit_24)

An event at layer k happens at layer k's *input*. This is the only place that derives events from the
fields of a schedule; passes, layout, the eager loop, reports and costs read them.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from hidrop_fx.schedule.schedule import Schedule

__all__ = ["Event", "events_of"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One change of the token set, at the input of one layer."""

    layer: int
    kind: str
    keep: int | float | None = None
    """Prune: tokens per image (int), or a fraction of the sample's vision tokens (float)."""
    scorer: str | None = None
    """Prune: the registered scorer that ranks the vision tokens."""
    selector: str | None = None
    """Prune: the rule that picks the survivors."""
    options: tuple[tuple[str, Hashable], ...] = ()
    """Further arguments of the kind, sorted by name."""

    @property
    def name(self) -> str:
        """Name of the event and of the segment that it opens, e.g. "prune_10"."""
        return f"{self.kind}_{self.layer}"

    def option(self, name: str, default: Hashable = None) -> Hashable:
        """Return one of `options`, or `default` where it is not given."""
        return dict(self.options).get(name, default)


def _options(schedule: Schedule) -> tuple[tuple[str, Hashable], ...]:
    merge = () if schedule.merge is None else (("merge", schedule.merge),)
    return (*merge, ("rank", schedule.rank))


def events_of(schedule: Schedule, num_layers: int) -> tuple[Event, ...]:
    """Derive the events of a schedule in the order in which a token meets them.

    Injection is always one of them, at layer 0 where vision tokens are there from the start. An exit
    behind the last layer is none. Vision tokens that are only read leave where they enter.
    """
    if schedule.reads is not None:
        return Event(layer=0, kind="inject"), Event(layer=0, kind="exit")
    events = [Event(layer=schedule.inject, kind="inject")]
    for layer, keep in schedule.prune.items():
        events.append(
            Event(
                layer=layer,
                kind="prune",
                keep=keep,
                scorer=schedule.score,
                selector=schedule.selection,
                options=_options(schedule),
            )
        )
    if schedule.exit is not None and schedule.exit < num_layers:
        events.append(Event(layer=schedule.exit, kind="exit"))
    return tuple(events)
