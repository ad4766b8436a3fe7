"""Differences of two runs, layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.inspection.instrumented import ProgramStates
from hidrop_fx.reference.rows import RowStates

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference taken for rounding, as a share of the largest reference value, by dtype."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Distance of a tensor from its reference."""

    largest: float
    """Largest absolute difference; of layers, over the tokens in common."""
    scale: float
    """Largest absolute value of the reference; for a gradient not less than a thousandth of the largest
    of all, since one that ought to be zero holds rounding alone."""
    tolerance: float

    @property
    def relative(self) -> float:
        """`largest` as a share of `scale`."""
        return self.largest / max(self.scale, 1e-30)

    @property
    def departs(self) -> bool:
        """True if this is more than rounding."""
        return not self.relative <= self.tolerance  # true for nan

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return {**asdict(self), "relative": self.relative, "departs": self.departs}


@dataclass(frozen=True, kw_only=True)
class LayerDifference(Difference):
    """Distance of one layer's hidden states from the reference, over all valid tokens of all rows."""

    layer: int | None
    """None for the normalised output after the last layer."""
    region: str
    """Module path, or "output"."""
    tokens: int
    """Tokens of the reference, over all rows."""
    missing: int
    """Of those, tokens that the program does not have here."""
    added: int
    """Tokens of the program that the reference does not have."""
    mean: float

    @property
    def departs(self) -> bool:
        """True if this is more than rounding."""
        return bool(self.missing or self.added) or super().departs

    @property
    def reason(self) -> str:
        """The difference in words; "" where nothing is wrong."""
        if self.missing or self.added:
            return (
                f"sees other tokens: {self.missing} of {self.tokens} are missing, {self.added} "
                "are there that should not be"
            )
        if not self.departs:
            return ""
        return (
            f"differs by {self.relative:.1e} of its largest value, {self.tolerance:.0e} is allowed"
        )


@dataclass(frozen=True, kw_only=True)
class ValueDifference(Difference):
    """Distance of a loss, or of one parameter's gradient, from the reference."""

    name: str
    """"loss", or the parameter's."""


def value_difference(
    name: str, expected: Tensor, found: Tensor, tolerance: float, floor: float = 0.0
) -> ValueDifference:
    """Compare one tensor with its reference.

    Args:
        name: of the difference.
        expected: of any shape.
        found: of the same shape.
        tolerance: largest difference taken for rounding, as a share of the scale.
        floor: least scale.
    """
    left, right = expected.detach().float(), found.detach().float()
    return ValueDifference(
        name=name,
        largest=float((left - right).abs().max()),
        scale=max(float(left.abs().max()), floor),
        tolerance=tolerance,
    )


def gradient_differences(
    expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None], tolerance: float
) -> tuple[ValueDifference, ...]:
    """Compare the gradients of every parameter with a reference; a missing one counts as zeros."""
    sizes = [float(g.abs().max()) for g in expected.values() if g is not None]
    floor = 1e-3 * max(sizes, default=0.0)
    differences = []
    for name, wanted in expected.items():
        got = found[name]
        if wanted is None and got is None:
            continue
        like = wanted if wanted is not None else got
        assert like is not None
        left, right = (torch.zeros_like(like) if g is None else g for g in (wanted, got))
        differences.append(value_difference(name, left, right, tolerance, floor))
    return tuple(differences)


def worst_of(differences: Sequence[ValueDifference]) -> ValueDifference | None:
    """Return the one that departs most; None without any."""
    # nan is larger than anything.
    return max(differences, key=lambda d: (d.relative != d.relative, d.relative), default=None)


def state_differences(
    reference: Sequence[RowStates], states: ProgramStates, *, length: int, tolerance: float
) -> tuple[LayerDifference, ...]:
    """Compare every layer of a program, and its output, with a reference.

    Args:
        reference: row by row.
        states: of the program.
        length: columns from there on are no tokens.
        tolerance: largest difference taken for rounding, as a share of the layer's largest value.
    """
    hold = partial(_layer_difference, reference, length=length, tolerance=tolerance)
    layers = zip(states.hidden, states.columns, states.paths, strict=True)
    return (
        *(hold(h, columns, layer=k, region=path) for k, (h, columns, path) in enumerate(layers)),
        hold(states.output, states.output_columns, layer=None, region="output"),
    )


def _layer_difference(
    reference: Sequence[RowStates],
    states: Tensor,
    columns: Tensor,
    *,
    layer: int | None,
    region: str,
    length: int,
    tolerance: float,
) -> LayerDifference:
    """Compare one layer of a program with a reference.

    Args:
        reference: row by row.
        states: [B, S, D].
        columns: [B, S], of which those of `length` and above are no tokens.
        layer: None for the output, of which only the columns that are there are compared.
    """
    sums = {"tokens": 0, "missing": 0, "added": 0}
    largest = total = scale = 0.0
    count = 0
    for row, wanted in enumerate(reference):
        index = -1 if layer is None else layer
        expected = wanted.output if layer is None else wanted.hidden[index]
        assert expected is not None
        there = columns[row] < length
        found, values = columns[row][there], states[row][there]
        places = wanted.columns[index]
        if layer is None:
            keep = torch.isin(places, found)
            places, expected = places[keep], expected[keep]
        same = torch.isin(places, found)
        sums["tokens"] += len(places)
        sums["missing"] += int((~same).sum())
        sums["added"] += int((~torch.isin(found, places)).sum())
        left = expected[same].float()
        right = values[torch.searchsorted(found, places[same])].float()
        if left.numel():
            gap = (left - right).abs()
            largest = _larger(largest, float(gap.max()))
            scale = max(scale, float(left.abs().max()))
            total += float(gap.sum())
            count += gap.numel()
    return LayerDifference(
        layer=layer,
        region=region,
        largest=largest,
        mean=total / max(count, 1),
        scale=scale,
        tolerance=tolerance,
        **sums,
    )


def _larger(a: float, b: float) -> float:
    """Return the larger of both; nan wins."""
    return b if b != b or b > a else a
