"""What a schedule means for a model and a sample: events, segments, token counts, costs, batch layout."""

from hidrop_fx.planning.plan import DEFAULT_TEXT_TOKENS, Plan, Segment, plan

__all__ = ["DEFAULT_TEXT_TOKENS", "Plan", "Segment", "plan"]
