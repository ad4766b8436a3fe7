"""How many vision tokens of a sample reach the decoder, and outlive each filter layer of a schedule.

    left = entering_tokens(schedule, vision_tokens, images)
    for layer, count in prune_counts(schedule, left, images, units, num_layers).items():
        left = count.left

Pure arithmetic over a schedule's fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods import MERGES
from hidrop_fx.schedule.keeps import PruneCount, averaged_keep, checked_int, keep_count

if TYPE_CHECKING:
    from hidrop_fx.schedule.schedule import Schedule


def prune_counts(
    schedule: Schedule, vision_tokens: int, images: int, units: int | None, num_layers: int | None
) -> dict[int, PruneCount]:
    """Count what stays of a sample's vision tokens at each filter layer, see `Schedule.prune_counts`."""
    left = checked_int(vision_tokens, "vision_tokens", minimum=0)
    units = images if units is None else units
    if schedule.per == "sample":
        units = min(1, images)
    if schedule.average is not None:
        return _averaged_counts(schedule, left, units, num_layers)
    added = None if schedule.merge is None else MERGES[schedule.merge].added
    scorer, counts = schedule.scorer, {}
    for layer, keep in schedule.prune.items():
        stays = min(left, keep_count(keep, vision_tokens, units, schedule.rounding))
        stays = min(stays, max(0, left - scorer.least_dropped))
        if scorer.most is not None:
            stays = min(stays, scorer.most(vision_tokens))
        more = (0, 0) if added is None else added(left - stays)
        counts[layer] = PruneCount(stays, *more)
        left = counts[layer].left
    return counts


def entering_tokens(schedule: Schedule, vision_tokens: int, images: int) -> int:
    """Count the vision tokens that a reducer leaves, see `Schedule.entering_tokens`."""
    found = schedule.reduction
    if found is None or not images:
        return vision_tokens
    each, more = divmod(vision_tokens, images)
    counts = [each + (i < more) for i in range(images)]
    try:
        return sum(found.kept(tokens) for tokens in counts if tokens)
    except ValueError as error:
        raise ScheduleError(f"before={schedule.before}: {error}") from None


def _averaged_counts(
    schedule: Schedule, vision_tokens: int, units: int, num_layers: int | None
) -> dict[int, PruneCount]:
    assert schedule.average is not None
    assert schedule.exit is not None
    (layer,) = schedule.prune
    if num_layers is None:
        raise ScheduleError(
            f"average={schedule.average} is over all layers: pass num_layers=..., the model's depth"
        )
    kept = averaged_keep(
        schedule.average,
        vision_tokens,
        units,
        inject=schedule.inject,
        layer=layer,
        exit=schedule.exit,
        num_layers=num_layers,
    )
    return {layer: PruneCount(kept)}
