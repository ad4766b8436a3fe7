"""IVC-Prune: tokens that the text and its seeds resemble by value, and those where RoPE's coordinates are extreme."""

from __future__ import annotations

from hidrop_fx.methods.published import Fields, pairs, register_method
from hidrop_fx.methods.queries import question
from hidrop_fx.methods.registry import Deferred, register_scorer
from hidrop_fx.ops.ivc_shares import most_kept

register_scorer(
    "value_similarity",
    queries=question,
    differentiable=False,
    most=most_kept,
    summary="foreground by similarity of values to the question and its seeds, and RoPE's coordinates",
)(
    Deferred(
        "hidrop_fx.ops.value_similarity:value_similarity",
        ("previous_value", "columns", "is_vision", "is_real", "query_columns", "cos", "sin"),
    )
)


@register_method(
    "ivc-prune",
    source="IVC-Prune, ICLR 2026; github.com/FireRedTeam/IVC-Prune, its Llama file",
    summary="one prune at `layer` by similarity of values in the layer before, and RoPE's coordinates; earlier caches follow",
)
def ivc_prune(*, layer: int = 16) -> Fields:
    """Keep at most 31 % of the vision tokens from `layer` on, and in the caches of layers 1 to `layer - 1`."""
    fields: Fields = {"prune": pairs([layer], [1.0]), "score": "value_similarity"}
    if isinstance(layer, int) and layer > 1:
        fields["cache"] = f"retroactive(layer={layer!r},first=1)"
    return fields
