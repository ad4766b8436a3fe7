"""What a schedule means for a model and a sample: events, segments, token counts, costs, batch layout."""

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
