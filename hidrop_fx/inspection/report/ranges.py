"""Runs of equal values, and ascending numbers as ranges."""

from collections.abc import Sequence
from typing import Any


def runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Return (first, last, value) of each run of equal neighbours: [5, 5, 7] -> [(0, 1, 5), (2, 2, 7)]."""
    found: list[tuple[int, int, Any]] = []
    for index, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], index, value)
        else:
            found.append((index, index, value))
    return found


def ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers as ranges: "0-4, 581-589"; "" if there are none."""
    # Neighbours differ from their index by the same amount.
    found = runs([number - index for index, number in enumerate(numbers)])
    return ", ".join(
        f"{numbers[a]}" if a == b else f"{numbers[a]}-{numbers[b]}" for a, b, _ in found
    )
