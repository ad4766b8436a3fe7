"""VTW: all vision tokens are withdrawn at one layer."""

from hidrop_fx.methods.published import Fields, register_method, required


@register_method(
    "vtw",
    source="VTW, AAAI 2025; github.com/lzhxmu/VTW",
    summary="all vision tokens leave at `layer`",
)
def vtw(*, layer: int = 15, positions: str = "persistent") -> Fields:
    """Withdraw at one layer; "compact" numbers the text anew behind it, as the code's other variant does."""
    required(layer=layer)
    return {"exit": layer, "positions": positions}
