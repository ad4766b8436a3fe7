"""Means over tokens that arrive batch by batch, one for each layer."""

import torch
from torch import Tensor


class Averages:
    """Sums and counts of `size` running means, in float64 on the CPU."""

    def __init__(self, size: int) -> None:
        self._sums = torch.zeros(size, dtype=torch.float64)
        self._counts = torch.zeros(size, dtype=torch.int64)

    def add(self, index: int, values: Tensor) -> None:
        """More values, of any shape, for one of the means."""
        self._sums[index] += values.double().sum().cpu()
        self._counts[index] += values.numel()

    def result(self) -> tuple[float | None, ...]:
        """The means; None where nothing was added."""
        pairs = zip(self._sums.tolist(), self._counts.tolist(), strict=True)
        return tuple(total / count if count else None for total, count in pairs)
