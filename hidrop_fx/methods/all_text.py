"""The attention of every text token of the prompt, averaged; answers do not take part."""

from hidrop_fx.methods.attention import MEAN, MEAN_SQUARE
from hidrop_fx.methods.queries import all_text
from hidrop_fx.methods.registry import register_scorer

register_scorer(
    "all_text",
    queries=all_text,
    averages_heads=True,
    summary="attention of every text token of the prompt, averaged",
)(MEAN)
register_scorer(
    "all_text_l2",
    queries=all_text,
    averages_heads=True,
    summary="root mean square of the same over heads and query rows",
)(MEAN_SQUARE)
