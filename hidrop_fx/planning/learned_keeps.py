"""Vision tokens that learned pruning ratios keep, counted on the host.

kept(row) = ceil(N * (1 - a))        # of the N vision tokens that reach the filter layer
"""

import math
from collections.abc import Mapping

# A ratio made from whole tokens, in fp32, is off by less.
_ROUNDING = 1e-3


def kept_tokens(tokens: int, ratio: float) -> int:
    """Return how many of a row's `tokens` a ratio keeps: those whose rank / N is above it, at least one."""
    if tokens == 0:
        return 0
    wanted = math.ceil(tokens * (1 - ratio) - _ROUNDING)
    return min(max(wanted, 1), tokens)


def keep_counts(tokens: int, ratios: Mapping[int, float]) -> dict[int, int]:
    """Return the vision tokens left of a row's `tokens`, by filter layer."""
    counts = {}
    for layer, ratio in ratios.items():
        tokens = kept_tokens(tokens, ratio)
        counts[layer] = tokens
    return counts
