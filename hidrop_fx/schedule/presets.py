"""Published schedules: HiDrop's for LLaVA-1.5-7B, with their layers scaled to other depths, and the registered methods."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods import METHODS
from hidrop_fx.schedule.keeps import checked_int

if TYPE_CHECKING:
    from hidrop_fx.schedule.schedule import Schedule

logger = logging.getLogger("hidrop_fx")

PRESET_LAYERS = 32
PUBLISHED: dict[str, tuple[int, dict[int, int], int]] = {
    "hidrop-80": (8, {10: 453, 13: 10, 16: 5, 19: 1}, 24),
    "hidrop-64": (8, {10: 215, 14: 10, 16: 5, 18: 1}, 24),
    "hidrop-48": (8, {10: 87, 14: 10, 16: 5, 18: 1}, 24),
}
"""Name -> inject, prune, exit."""
PRESETS: tuple[str, ...] = ("identity", *PUBLISHED, *METHODS)


def preset_fields(
    name: str, arguments: Mapping[str, Any], num_layers: int | None
) -> dict[str, Any]:
    """Return the fields of the schedule that a preset names, HiDrop's at a depth of `num_layers`.

    Raises:
        ScheduleError: no such preset or argument, or its events do not fit into `num_layers` layers.
    """
    if name in METHODS:
        return dict(METHODS[name](**arguments))
    if name != "identity" and name not in PUBLISHED:
        known = ", ".join(["identity", *PUBLISHED, *METHODS])
        raise ScheduleError(f"no preset {name!r}: choose one of {known}")
    if arguments:
        raise ScheduleError(
            f"preset {name!r} takes no arguments, and was given {', '.join(arguments)}"
        )
    if name == "identity":
        return {}
    inject, prune, exit_ = PUBLISHED[name]
    num_layers = PRESET_LAYERS if num_layers is None else num_layers
    num_layers = checked_int(num_layers, "num_layers", minimum=1)
    layers = [inject, *prune, exit_]
    if num_layers != PRESET_LAYERS:
        layers = scaled_layers(name, layers, num_layers)
    keeps = dict(zip(layers[1:-1], prune.values(), strict=True))
    return {"inject": layers[0], "prune": keeps, "exit": layers[-1]}


def warn_if_scaled(name: str, schedule: Schedule, num_layers: int | None) -> None:
    """Log the layers of one of HiDrop's presets at another depth than it was found for."""
    if name not in PUBLISHED or num_layers in (None, PRESET_LAYERS):
        return
    logger.warning(
        "preset %s was found for %d layers; scaled to %d layers it is %s: check it on your model",
        name,
        PRESET_LAYERS,
        num_layers,
        schedule,
    )


def scaled_layers(name: str, layers: list[int], num_layers: int) -> list[int]:
    """Scale `layers` of a 32-layer preset to another depth, strictly increasing in 1 .. num_layers - 1."""
    if num_layers <= len(layers):
        raise ScheduleError(
            f"num_layers={num_layers} is too small for preset {name}: its {len(layers)} events need "
            f"{len(layers) + 1} layers; write a schedule of your own, such as Schedule(inject=1, "
            "prune={2: 0.5})"
        )
    scaled = [(2 * layer * num_layers + PRESET_LAYERS) // (2 * PRESET_LAYERS) for layer in layers]
    scaled[0] = max(scaled[0], 1)
    for i in range(1, len(scaled)):
        scaled[i] = max(scaled[i], scaled[i - 1] + 1)
    return [min(layer, num_layers - len(scaled) + i) for i, layer in enumerate(scaled)]
