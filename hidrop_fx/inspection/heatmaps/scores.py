"""What a filter layer thought of one image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """One image at one filter layer."""

    layer: int
    scores: Tensor
    """fp32 [tokens]; nan where a token was gone before."""
    kept: Tensor
    """bool [tokens]"""
