"""ViCA: no layer updates vision tokens; text reads their projected features at a few layers."""

from collections.abc import Sequence

from hidrop_fx.methods.published import Fields, register_method, required


@register_method(
    "vica",
    source="ViCA, arXiv 2602.07574; github.com/EIT-NLP/ViCA",
    summary="vision tokens are rows of no layer; text attends to their features at `layers`",
    trains=True,
)
def vica(
    *, layers: Sequence[int] = (0, 1, 7, 8, 9, 10, 11, 14), freeze_system: bool = True
) -> Fields:
    """Read frozen vision tokens at the layers found for a 7B model, whose system prompt attention leaves alone."""
    required(layers=layers)
    return {"reads": layers, "freeze_system": freeze_system}
