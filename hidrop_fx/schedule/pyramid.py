"""Concave pyramids: a fast first cut, then a short tail, as HiDrop's authors prune.

    vision tokens by layer:   0 ... 0 | V ... V | head ... | tail[0] ... | tail[1] ... | 0 ... 0
                                  inject    filters[0]  filters[1]   filters[2]       exit

The tail is given and the head is what the budget leaves. The authors' three lists have the tail
10, 5, 1 and the heads 453, 215 and 87, which make 80, 64 and 48 tokens a layer: the head is rounded to the
nearest whole token, so their 80 is 80.03. Pure arithmetic.
"""

import itertools
import math
import numbers
from collections.abc import Sequence
from fractions import Fraction

from hidrop_fx.errors import ScheduleError
from hidrop_fx.schedule.keeps import checked_int

TAIL: tuple[int, ...] = (10, 5, 1)
"""Keeps behind the head in all of the authors' lists."""


def concave_keeps(
    *,
    inject: int,
    exit: int,
    filters: Sequence[int],
    tail: Sequence[int],
    average: float,
    num_layers: int,
    vision_tokens: int,
) -> dict[int, int]:
    """Return what each filter layer keeps, the head that is solved for and the tail, see `Schedule.concave`.

    Raises:
        ScheduleError: an argument is no number of its kind, or as for `concave_head`.
    """
    depth = checked_int(num_layers, "num_layers", minimum=1)
    layers = [checked_int(layer, "filter layer", minimum=0) for layer in filters]
    keeps = [checked_int(keep, "tail", minimum=1) for keep in tail]
    if (
        isinstance(average, bool)
        or not isinstance(average, numbers.Real)
        or not 0 < average < math.inf
    ):
        raise ScheduleError(f"average={average!r}: use a number of vision tokens a layer, above 0")
    head = concave_head(
        inject=checked_int(inject, "inject", minimum=0),
        exit=checked_int(exit, "exit", minimum=1),
        filters=layers,
        tail=keeps,
        average=average if isinstance(average, int) else float(average),
        num_layers=depth,
        vision_tokens=checked_int(vision_tokens, "vision_tokens", minimum=1),
    )
    return dict(zip(layers, [head, *keeps], strict=True))


def concave_head(
    *,
    inject: int,
    exit: int,
    filters: Sequence[int],
    tail: Sequence[int],
    average: float,
    num_layers: int,
    vision_tokens: int,
) -> int:
    """Solve for the first filter layer's keep that gives an average over all layers, to the nearest token.

    Raises:
        ScheduleError: layers out of order, as many tails as filters or more, or no head in
            `tail[0] .. vision_tokens` comes to the average; says which averages are possible.
    """
    layers = [inject, *filters, exit]
    if not filters or len(tail) != len(filters) - 1:
        raise ScheduleError(
            f"filters={list(filters)} and tail={tuple(tail)}: the first filter layer keeps the head that "
            f"is solved for and each one after it an entry of the tail, so {len(tail)} in the tail "
            f"need {len(tail) + 1} filter layers"
        )
    if list(filters) != sorted(set(filters)) or not inject <= filters[0] or filters[-1] >= exit:
        raise ScheduleError(
            f"inject={inject}, filters={list(filters)}, exit={exit}: layers must ascend, with "
            "inject <= first filter and last filter < exit"
        )
    if exit > num_layers:
        raise ScheduleError(
            f"exit={exit} but num_layers={num_layers}: use exit <= {num_layers}, or pass the model's depth"
        )
    if any(keep < 1 for keep in tail) or list(tail) != sorted(tail, reverse=True):
        raise ScheduleError(f"tail={tuple(tail)}: keeps must be >= 1 and may not grow")
    widths = [stop - start for start, stop in itertools.pairwise(layers)]
    fixed = vision_tokens * widths[0]
    fixed += sum(keep * width for keep, width in zip(tail, widths[2:], strict=True))
    wanted = Fraction(repr(average)) if isinstance(average, float) else Fraction(average)
    head = math.floor((wanted * num_layers - fixed) / widths[1] + Fraction(1, 2))
    least = max([*tail[:1], 1])
    if not least <= head <= vision_tokens:
        low, high = ((fixed + h * widths[1]) / num_layers for h in (least, vision_tokens))
        raise ScheduleError(
            f"average={average} is out of reach: with inject={inject}, filters={list(filters)}, "
            f"exit={exit}, tail={tuple(tail)} and {vision_tokens} vision tokens, {num_layers} layers "
            f"average {low:.2f} to {high:.2f}; "
            + (
                "put the first filter earlier, or exit earlier"
                if head < least
                else "put the first filter or the exit later"
            )
        )
    return head


def pyramid(level: int, tail: Sequence[int], vision_tokens: int) -> tuple[int, ...]:
    """Return the keeps of `len(tail) + 1` filter layers; none of them ever shrinks as the level rises.

    Level 1 keeps one token everywhere. Up to `vision_tokens` the level is the head, and the tail follows
    where the head is smaller; then the first entry of the tail grows to all tokens, then the next, until
    nothing is pruned at `highest_level`.
    """
    keeps = [min(level, vision_tokens)]
    spare = level - vision_tokens
    for keep in tail:
        keep = min(keep, vision_tokens)
        grown = max(0, min(spare, vision_tokens - keep))
        keeps.append(min(keep + grown, level))
        spare -= vision_tokens - keep
    return tuple(keeps)


def highest_level(tail: Sequence[int], vision_tokens: int) -> int:
    """Return the level at which `pyramid` keeps everything."""
    return vision_tokens + sum(vision_tokens - min(keep, vision_tokens) for keep in tail)
