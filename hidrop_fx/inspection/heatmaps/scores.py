"""Scores of one image at a filter layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """Scores and survivors of one image at one filter layer."""

    layer: int
    scores: Tensor
    """fp32 [tokens]; nan where a token was gone before."""
    kept: Tensor
    """bool [tokens]"""
