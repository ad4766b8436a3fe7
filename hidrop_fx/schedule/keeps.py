"""Keeps: how many vision tokens each filter layer lets pass, an int per image or a float as a fraction.

    keep_count(215, vision_tokens=1152, images=2)       # 430
    keep_count(0.15, vision_tokens=10)                  # 2, rounded half up

Pure arithmetic, and the checks of numbers that a user gives.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

from hidrop_fx.errors import ScheduleError


class Keeps(Mapping[int, int | float]):
    """An immutable, hashable mapping `layer -> keep`, in the order of the layers.

    Unlike a dict it tells `{10: 1}` (one token) from `{10: 1.0}` (all of them).
    """

    def __init__(self, entries: Mapping[int, int | float]) -> None:
        self._entries = dict(sorted(entries.items()))

    def __getitem__(self, layer: int) -> int | float:
        return self._entries[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return dict(self) == dict(other) and all(
            isinstance(keep, float) == isinstance(other[layer], float)
            for layer, keep in self.items()
        )

    def __hash__(self) -> int:
        return hash(tuple(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self._entries)


class PruneCount(NamedTuple):
    """What a prune makes of a sample's vision tokens."""

    stays: int
    """Those that stay as they are, or take others in."""
    merged: int = 0
    """Those of the dropped that are merged into added ones."""
    added: int = 0
    """Those that are added behind the last that stays."""

    @property
    def left(self) -> int:
        """Vision tokens behind the prune."""
        return self.stays + self.added


ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "half_up": lambda tokens: math.floor(tokens + Fraction(1, 2)),
    "half_even": round,
    "floor": math.floor,
}
"""Rules by which a fraction of a sample's vision tokens becomes a number of tokens, by name."""


def keep_count(
    keep: int | float, vision_tokens: int, images: int = 1, rounding: str = "half_up"
) -> int:
    """Count a sample's vision tokens that one keep asks for, at least one and at most all of them.

    An int counts per image. A float is a fraction, taken as the decimal number it is written as:
    0.15 of 10 tokens is 1.5, rounded half up to 2, although the binary 0.15 is a little less.
    """
    vision_tokens = checked_int(vision_tokens, "vision_tokens", minimum=0)
    images = checked_int(images, "images", minimum=0)
    if vision_tokens == 0:
        return 0
    if images == 0:
        raise ScheduleError(
            f"vision_tokens={vision_tokens} but images=0: give the number of images they come from"
        )
    if isinstance(keep, float):
        wanted = max(1, ROUNDINGS[rounding](Fraction(repr(float(keep))) * vision_tokens))
    else:
        wanted = keep * images
    return min(wanted, vision_tokens)


def averaged_keep(
    average: int | float,
    vision_tokens: int,
    images: int,
    *,
    inject: int,
    layer: int,
    exit: int,
    num_layers: int,
) -> int:
    """Count what a filter layer keeps of a sample's vision tokens for all layers to see `average` an image, on average.

    They see all of them from `inject` to `layer`, what it keeps up to `exit`, and none behind; rounded up.

    Raises:
        ScheduleError: it is less than none, or more than there are.
    """
    if vision_tokens == 0:
        return 0
    wanted = num_layers * Fraction(repr(average)) * images
    before = (layer - inject) * vision_tokens
    kept = math.ceil((wanted - before) / (exit - layer))
    if 0 <= kept <= vision_tokens:
        return kept
    least = Fraction(before, num_layers * images)
    most = Fraction(before + (exit - layer) * vision_tokens, num_layers * images)
    room = (
        f"an average from {math.ceil(least)} to {math.floor(most)}, or another exit or filter layer"
    )
    raise ScheduleError(
        f"average={average} leaves {kept} of {vision_tokens} vision tokens ({images} image{'s' * (images != 1)}) at prune "
        f"layer {layer}, with exit={exit} of {num_layers} layers, which is no number of tokens there; use {room}"
    )


def checked_int(value: Any, name: str, *, minimum: int) -> int:
    """Return `value` as a plain int (numpy's integers too).

    Raises:
        ScheduleError: it is no integer, or below `minimum`; names the argument `name`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ScheduleError(
            f"{name}={value!r} is a {type(value).__name__}: use an integer >= {minimum}"
        )
    if value < minimum:
        raise ScheduleError(f"{name}={int(value)} is too small: use an integer >= {minimum}")
    return int(value)


def checked_layers(layers: Any, name: str) -> tuple[int, ...]:
    """Return layers as plain ints, ascending.

    Raises:
        ScheduleError: there is none, one is no layer, or comes twice; names the argument `name`.
    """
    if not isinstance(layers, Iterable) or isinstance(layers, str | bytes | Mapping):
        raise ScheduleError(
            f"{name}={layers!r} is a {type(layers).__name__}: use a sequence of layers, such as (0, 1, 7)"
        )
    found = sorted(checked_int(layer, f"{name} layer", minimum=0) for layer in layers)
    if not found:
        raise ScheduleError(f"{name}={layers!r} names no layer: name one, or leave {name} out")
    for layer, following in pairwise(found):
        if layer == following:
            raise ScheduleError(f"{name}={layers!r} names layer {layer} twice: name it once")
    return tuple(found)


def checked_keeps(prune: Any) -> Keeps:
    """Return a mapping from filter layer to keep with plain numbers, in the order of the layers.

    Raises:
        ScheduleError: it is no mapping, an entry is no layer or keep, or keeps of one kind grow.
    """
    if not isinstance(prune, Mapping):
        raise ScheduleError(
            f"prune={prune!r} is a {type(prune).__name__}: use a mapping from layer to keep, such as "
            "{10: 215, 14: 0.05}"
        )
    entries: dict[int, int | float] = {}
    for key, value in prune.items():
        layer = checked_int(key, "prune layer", minimum=0)
        entries[layer] = _checked_keep(value, layer)
    keeps = Keeps(entries)

    # Tokens and fractions can only be compared once the number of vision tokens is known.
    last: dict[type, tuple[int, int | float]] = {}
    for layer, keep in keeps.items():
        before, least = last.get(type(keep), (layer, keep))
        if keep > least:
            raise ScheduleError(
                f"keep grows from {least} at prune layer {before} to {keep} at prune layer {layer}: "
                f"pruned tokens cannot come back; use at most {least} there"
            )
        last[type(keep)] = (layer, keep)
    return keeps


def _checked_keep(value: Any, layer: int) -> int | float:
    place = f"keep {value!r} at prune layer {layer}"
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if value < 1:
            raise ScheduleError(
                f"{place} is not a number of tokens: use an int >= 1, or exit={layer} to drop all"
            )
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational | bool):
        fraction = float(str(value))  # through str, so that numpy's float32 0.1 becomes 0.1
        if not 0 < fraction <= 1:
            raise ScheduleError(
                f"{place} is not a fraction: use a float in (0, 1], or an int for tokens per image"
            )
        return fraction
    raise ScheduleError(
        f"{place} is a {type(value).__name__}: use an int >= 1 (tokens per image) or a float in "
        "(0, 1] (a fraction)"
    )


def checked_average(value: Any) -> int | float | None:
    """Return an average of vision tokens a layer as a plain number.

    Raises:
        ScheduleError: it is no number above 0.
    """
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 < float(value) < math.inf:
        raise ScheduleError(f"average={value!r}: use a number of vision tokens a layer, above 0")
    return int(value) if isinstance(value, numbers.Integral) else float(str(value))


def checked_weight(value: Any) -> float:
    """Return a weight of the budget term as a float.

    Raises:
        ScheduleError: it is no number, or below 0.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ScheduleError(f"budget_weight={value!r} is not a number; use one >= 0")
    if not 0 <= float(value) < math.inf:
        raise ScheduleError(f"budget_weight={value!r}: use a number >= 0, 1.0 by default")
    return float(value)
