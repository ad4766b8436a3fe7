"""Attention mass: the share of the query rows' attention on vision, and its entropy over the tokens.

    score      = mean over heads and query rows of the attention to each vision token
    mass[k]    = sum(score)
    entropy[k] = -sum(p log p), p = score / mass            # nats; log V is even over all V

The score is the one that vision tokens are pruned by.
"""

from torch import Tensor

from hidrop_fx.analysis.measuring.averages import Averages


class AttentionMass:
    """Mass and entropy by layer, mean over the samples that have vision tokens."""

    def __init__(self, num_layers: int) -> None:
        self.mass = Averages(num_layers)
        self.entropy = Averages(num_layers)

    def add(self, layer: int, attention: Tensor, counts: Tensor) -> None:
        """Add one layer of one batch: attention [B, H, V], vision tokens of each row [B]."""
        score = attention.mean(dim=1)[counts > 0]
        mass = score.sum(dim=1)
        shares = score / mass.clamp(min=1e-30)[:, None]
        self.mass.add(layer, mass)
        self.entropy.add(layer, -shares.xlogy(shares).sum(dim=1))
