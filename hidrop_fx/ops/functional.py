"""Operators in the place of those that have no derivative."""

from typing import Any

from torch import Tensor


def copied(like: Tensor, source: Tensor, *_: Any) -> Tensor:
    """Return `source` in the dtype and shape of `like`, as `aten.copy` does."""
    return source.to(like.dtype).expand(like.shape)
