"""HiDrop's score: the attention of the last prompt token, which is about to be answered."""

from hidrop_fx.methods.attention import MEAN, MEAN_SQUARE
from hidrop_fx.methods.queries import last_prompt_token, last_round
from hidrop_fx.methods.registry import register_scorer

register_scorer("last_token", queries=last_prompt_token)(MEAN)
register_scorer("last_token_one_round", queries=last_round)(MEAN)
register_scorer("last_token_l2", queries=last_prompt_token)(MEAN_SQUARE)
