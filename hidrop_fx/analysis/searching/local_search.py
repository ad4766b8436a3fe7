"""Local search over layers and counts inside a budget.

    while evaluations are left:
        candidate = a random step from the best schedule: move tokens between layers, shift an event
        best = candidate if budget.allows(candidate) and it does better

A schedule is searched as its vision tokens by layer, a row that rises once and then falls:

    [0, 0, 0, 144, 32, 10, 5, 1, 0, 0, 0, 0]  <->  inject=3,prune=4:32+5:10+6:5+7:1,exit=8
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from hidrop_fx.schedule.schedule import Schedule

Counts = tuple[int, ...]

_STEPS = (1, 2, 3, 5, 8, 13)
# Steps drawn in a row that lead nowhere new; then the neighbourhood is taken for searched.
_PATIENCE = 400


def schedule_of(counts: Sequence[int], vision_tokens: int, **fields: Any) -> Schedule:
    """Return the schedule with these counts by layer; a filter layer wherever the count falls."""
    inject = next(layer for layer, count in enumerate(counts) if count)
    prune: dict[int, int | float] = {}
    before = vision_tokens
    for layer in range(inject, len(counts)):
        if counts[layer] == 0:
            return Schedule(inject=inject, prune=prune, exit=layer, **fields)
        if counts[layer] < before:
            prune[layer] = before = counts[layer]
    return Schedule(inject=inject, prune=prune, **fields)


def neighbour(counts: Counts, vision_tokens: int, rng: random.Random) -> Counts | None:
    """Draw a step: tokens added in one layer, removed in another; None if that is no pyramid."""
    moved = list(counts)
    step = rng.choice(_STEPS)
    near = [k for k in range(len(counts)) if any(counts[max(0, k - 1) : k + 2])]
    more, fewer = rng.choice(near), rng.choice(near)
    first = next(k for k, count in enumerate(counts) if count)
    if moved[more] == 0 and more < first:
        moved[more] = vision_tokens
    else:
        moved[more] = min(moved[more] + step, vision_tokens)
    moved[fewer] = max(moved[fewer] - (step if rng.random() < 0.7 else moved[fewer]), 0)
    return tuple(moved) if _falls(moved) and tuple(moved) != counts else None


def _falls(counts: Sequence[int]) -> bool:
    """Return True if the counts are zeros, then positive numbers that never grow, then zeros."""
    inside = list(counts)
    while inside and inside[0] == 0:
        inside.pop(0)
    return bool(inside) and all(a >= b for a, b in itertools.pairwise(inside))


def local_search(
    start: Schedule,
    *,
    counts: Counts,
    vision_tokens: int,
    allowed: Callable[[Schedule], bool],
    loss: Callable[[Schedule], tuple[float, ...]],
    evaluations: int,
    seed: int,
    tick: Callable[[Schedule, bool], None] | None = None,
) -> Schedule:
    """Search for the schedule of least loss with a number of evaluations; the start if none is better.

    Args:
        counts: vision tokens of the start by layer, for one image.
        vision_tokens: of one image.
        allowed: returns True if a schedule is inside the budget.
        loss: numbers to minimise, compared in order.
        tick: called with each evaluated schedule, and True if it is the best so far.
    """
    rng = random.Random(seed)
    fields = {"score": start.score, "positions": start.positions}
    best, best_loss = start, loss(start)
    place = counts
    seen, barren = {place}, 0
    while evaluations > 0 and barren < _PATIENCE:
        barren += 1
        moved = neighbour(place, vision_tokens, rng)
        if moved is None or moved in seen:
            continue
        candidate = schedule_of(moved, vision_tokens, **fields)
        if not allowed(candidate):
            continue
        seen.add(moved)
        barren = 0
        evaluations -= 1
        found = loss(candidate)
        better = found < best_loss
        if better:
            best, best_loss, place = candidate, found, moved
        if tick is not None:
            tick(candidate, better)
    return best
