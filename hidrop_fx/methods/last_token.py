"""HiDrop's score: the attention of the last prompt token, which is about to be answered."""

from hidrop_fx.methods.attention import MEAN, MEAN_SQUARE
from hidrop_fx.methods.queries import last_prompt_token, last_round
from hidrop_fx.methods.registry import register_scorer

register_scorer(
    "last_token",
    queries=last_prompt_token,
    averages_heads=True,
    summary="attention of the last prompt token; in training before each answer, averaged",
)(MEAN)
register_scorer(
    "last_token_one_round",
    queries=last_round,
    averages_heads=True,
    summary="the same; in training before the last answer alone",
)(MEAN)
register_scorer(
    "last_token_l2",
    queries=last_prompt_token,
    averages_heads=True,
    summary="root mean square of the same over heads and query rows",
)(MEAN_SQUARE)
