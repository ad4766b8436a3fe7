"""IVC-Prune's shares of a row's vision tokens, for its rule and for the count of what may stay; no tensors here."""

SEEDS = 0.01
"""Those most like the question; at least one."""
FOREGROUND = 0.2
"""Those most like the question and the seeds."""
COORDINATES = 0.05
"""Those with the largest mean cosine of RoPE, and as many with the largest mean sine."""


def most_kept(tokens: int) -> int:
    """Count the tokens that stay of so many, were no two sets to overlap."""
    if tokens == 0:
        return 0
    found = max(1, round(SEEDS * tokens)) + round(FOREGROUND * tokens)
    return min(tokens, found + 2 * round(COORDINATES * tokens))
