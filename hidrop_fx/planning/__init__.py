"""A schedule as data: events, segments, layer tokens; its costs; the layout of a batch under it."""

from hidrop_fx.planning.costs import DEFAULT_TEXT_TOKENS, Costs, Run, Sample, plan
from hidrop_fx.planning.events import Event
from hidrop_fx.planning.plan import LayerTokens, Plan, Segment

__all__ = [
    "DEFAULT_TEXT_TOKENS",
    "Costs",
    "Event",
    "LayerTokens",
    "Plan",
    "Run",
    "Sample",
    "Segment",
    "plan",
]
