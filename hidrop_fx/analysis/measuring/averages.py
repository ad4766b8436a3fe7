"""Means over tokens that arrive batch by batch, one for each layer."""

import torch
from torch import Tensor


class Averages:
    """Running means, `size` of them, in float64 on the CPU."""

    def __init__(self, size: int) -> None:
        self._sums = torch.zeros(size, dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(size, dtype=torch.int64, device="cpu")

    def add(self, index: int, values: Tensor) -> None:
        """Add values, of any shape, to one of the means."""
        self._sums[index] += values.double().sum().cpu()
        self._counts[index] += values.numel()

    def result(self) -> tuple[float | None, ...]:
        """Return the means; None where nothing was added."""
        pairs = zip(self._sums.tolist(), self._counts.tolist(), strict=True)
        return tuple(total / count if count else None for total, count in pairs)
