"""Checks of a schedule against a model, before anything of the model is touched.

schedule, plan = fitted(model, "hidrop-64")
"""

from typing import Any

from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.models import family_of
from hidrop_fx.models.frozen import check_reads
from hidrop_fx.models.items import check_units
from hidrop_fx.models.scored import check_scorer
from hidrop_fx.models.tower_tokens import check_reduction
from hidrop_fx.models.without_attention import (
    check_layers_without_attention,
    kept_by_convolutions,
)
from hidrop_fx.planning import Plan
from hidrop_fx.planning.geometry import depth_of, largest_image, vision_tokens_per_image
from hidrop_fx.runtime.axes import check_positions
from hidrop_fx.runtime.bottleneck import check_bottleneck
from hidrop_fx.runtime.deepstack import check_deepstack
from hidrop_fx.schedule.schedule import Schedule


def fitted(model: Any, schedule: Schedule | str) -> tuple[Schedule, Plan]:
    """Return a schedule, read where it is a text, and its plan for a model that it fits.

    Args:
        model: a transformers VLM, without wrappers around it.

    Raises:
        ScheduleError: it is no schedule, or does not fit the model's depth.
        UnsupportedModelError: the model has none of what it needs.
    """
    layers = depth_of(model)
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, num_layers=layers)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule is a {type(schedule).__name__}; pass a hidrop_fx.Schedule, or a string such as "
            '"hidrop-64" or "inject=8,prune=10:215+14:10,exit=24", or a dictionary of them by name'
        )
    family = family_of(model)
    check_positions(family, schedule)
    check_deepstack(model, schedule)
    check_units(model, family, schedule)
    check_reduction(model, family, schedule.reduction)
    check_reads(model, family, schedule)
    check_merge(model, schedule)
    check_bottleneck(model, family, schedule)
    check_scorer(model, schedule)
    plan = Plan.of(schedule, layers, kept_by_convolutions(model))
    check_layers_without_attention(model, plan)
    _check_learned_keeps(model, schedule)
    return schedule, plan


def check_merge(model: Any, schedule: Schedule) -> None:
    """Check that a vision token stands for no more than its state, of which a mean can be taken.

    Raises:
        UnsupportedModelError: the model adds to it, or its masks know which tokens make an image.
    """
    more = family_of(model).beyond_features
    if schedule.merge is not None and more is not None:
        raise UnsupportedModelError(
            f"merge={schedule.merge!r} averages vision tokens of a row, and {type(model).__name__} has {more}, in "
            "which a mean of several has no place; leave merge out"
        )


def _check_learned_keeps(model: Any, schedule: Schedule) -> None:
    """Raise `ScheduleError` where learned ratios cannot start at counts, since images have any number of tokens."""
    if not schedule.learns or vision_tokens_per_image(model) is not None:
        return
    for layer, keep in schedule.prune.items():
        if isinstance(keep, int) or largest_image(model) is None:
            raise ScheduleError(
                f"selection={schedule.selection!r} starts from the share of an image that prune layer {layer} keeps, "
                f"but keeps {keep} of images that vary in their number of tokens; write keeps as fractions of "
                "images, with a vision tower of which hidrop_fx knows the patches (CLIP, SigLIP, DINOv2, Pixtral)"
            )
