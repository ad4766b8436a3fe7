"""A schedule's `deepstack` against a model: checked, and in words."""

import logging
from typing import Any

from hidrop_fx.errors import ScheduleError
from hidrop_fx.models import family_of
from hidrop_fx.schedule.checks import DEEPSTACK
from hidrop_fx.schedule.schedule import Schedule

logger = logging.getLogger("hidrop_fx")


def check_deepstack(model: Any, schedule: Schedule) -> None:
    """Check that a schedule leaves a model's images whole, and log where its `deepstack` means nothing.

    Raises:
        ScheduleError: an image is what is added to it, and the schedule leaves a part of that out.
    """
    deepstack = family_of(model).deepstack
    if deepstack is None:
        if schedule.deepstack != DEEPSTACK[0]:
            logger.warning(
                "deepstack=%r means nothing to %s, which adds no features between its layers",
                schedule.deepstack,
                type(model).__name__,
            )
        return
    places = deepstack.places(model.config)
    if places.loses_images(schedule):
        raise ScheduleError(
            f"inject={schedule.inject} with deepstack='skip': an image of this model is what is added at the inputs "
            f"of layers {', '.join(map(str, places.layers))}, and would lose what comes before; use "
            f"deepstack='at_inject', or inject={places.layers[0]}"
        )


def described_deepstack(model: Any, schedule: Schedule) -> str:
    """Say where a model adds features under a schedule; empty if it adds none."""
    deepstack = family_of(model).deepstack
    return "" if deepstack is None else deepstack.places(model.config).described(schedule)
