"""Copies of many tensors into as many others: one launch for each dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Copies:
    """An order of copying for tensors of known dtypes.

    Args:
        like: tensors of the dtypes that are to be copied, in order.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        groups: dict[torch.dtype, list[int]] = {}
        for place, value in enumerate(like):
            groups.setdefault(value.dtype, []).append(place)
        self._groups = list(groups.values())

    def __call__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy each source into its target."""
        for places in self._groups:
            torch._foreach_copy_([targets[i] for i in places], [sources[i] for i in places])

    @torch.no_grad()
    def clone(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Return copies in memory of their own."""
        fresh = [torch.empty_like(value) for value in sources]
        self(fresh, sources)
        return fresh
