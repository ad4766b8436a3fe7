"""Published schedules: HiDrop's for LLaVA-1.5-7B, with their layers scaled to other depths."""

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods import METHODS

PRESET_LAYERS = 32
PUBLISHED: dict[str, tuple[int, dict[int, int], int]] = {
    "hidrop-80": (8, {10: 453, 13: 10, 16: 5, 19: 1}, 24),
    "hidrop-64": (8, {10: 215, 14: 10, 16: 5, 18: 1}, 24),
    "hidrop-48": (8, {10: 87, 14: 10, 16: 5, 18: 1}, 24),
}
"""Name -> inject, prune, exit."""
PRESETS: tuple[str, ...] = ("identity", *PUBLISHED, *METHODS)


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
