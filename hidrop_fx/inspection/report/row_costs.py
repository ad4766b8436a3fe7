"""Costs of a batch, row by row, from the counts of its layout."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

from hidrop_fx.planning import Costs, plan
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.planning.plan import TEXT
from hidrop_fx.schedule.schedule import Schedule


def costs_of_rows(model: Any, layout: Layout) -> list[Costs]:
    """Compute the costs of every row; of learned ratios, with the counts that they came to."""
    schedule = layout.plan.schedule
    (injection,) = layout.plan.of_kind("inject")

    @lru_cache
    def costs(
        schedule: Schedule, text: int, vision: int, removed: int, images: int, units: int
    ) -> Costs:
        return plan(
            schedule,
            model,
            text_tokens=text,
            vision_tokens=vision + removed,
            entering_tokens=vision,
            images=images,
            units=units,
        )

    found = []
    for row, images in enumerate(layout.images):
        text, vision = layout.counts[TEXT][row], layout.vision_counts[injection.name][row]
        tokens = text, vision, layout.removed[row]
        if schedule.learns:
            found.append(costs(_as_it_ran(layout, row), *tokens, images=1, units=1))
        else:
            of_row = costs(schedule, *tokens, images=images, units=layout.units[row])
            if layout.unseen:
                sample = replace(of_row.sample, unseen=layout.unseen[row])
                of_row = replace(of_row, sample=sample)
            found.append(of_row)
    return found


def _as_it_ran(layout: Layout, row: int) -> Schedule:
    """Return the schedule with the counts that its learned ratios came to in this row."""
    filters = layout.plan.of_kind("prune")
    counts = {event.layer: layout.vision_counts[event.name][row] for event in filters}
    return layout.plan.schedule.with_keeps({k: max(1, count) for k, count in counts.items()})
