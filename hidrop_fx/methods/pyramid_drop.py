"""PyramidDrop: prunes at a few layers, each by its own attention, and renumbered survivors."""

from collections.abc import Sequence

from hidrop_fx.methods.published import Fields, pairs, register_method


@register_method(
    "pyramiddrop",
    source="PyramidDrop, CVPR 2025; github.com/Cooperx521/PyramidDrop",
    summary="prunes by the filter layer's own attention of the last prompt token; survivors are renumbered",
    trains=True,
)
def pyramiddrop(
    *, layers: Sequence[int] = (8, 16, 24), keeps: Sequence[int | float] = (0.5, 0.25, 0.125)
) -> Fields:
    """Keep so many tokens an image, or shares of the sample's, rounded down."""
    return {"prune": pairs(layers, keeps), "positions": "compact", "rounding": "floor"}
