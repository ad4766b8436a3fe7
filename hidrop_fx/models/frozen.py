"""Check that a model's vision tokens may stay as they are while text reads them."""

from typing import Any

from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.models.family import Family
from hidrop_fx.schedule.schedule import Schedule


def check_reads(model: Any, family: Family, schedule: Schedule) -> None:
    """Check that the decoder makes no more of an image than its features.

    Raises:
        UnsupportedModelError: it adds to them, or its masks know which tokens make an image.
    """
    if schedule.reads is not None and family.beyond_features is not None:
        raise UnsupportedModelError(
            f"reads={schedule.reads} lets no layer update vision tokens, and {type(model).__name__} has "
            f"{family.beyond_features}; use inject, prune and exit"
        )
