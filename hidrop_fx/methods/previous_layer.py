"""FastV: one prune, scored by the attention that the last prompt token paid in the layer before."""

from hidrop_fx.methods.published import Fields, pairs, register_method
from hidrop_fx.methods.queries import last_prompt_token
from hidrop_fx.methods.registry import Deferred, register_scorer

register_scorer(
    "previous_layer",
    queries=last_prompt_token,
    averages_heads=True,
    summary="attention of the last prompt token in the layer before; in training before each answer, averaged",
)(
    Deferred(
        "hidrop_fx.ops.attention_scores:previous_attention_scores",
        ("previous_query", "previous_key", "columns", "query_columns", "previous_scale"),
        ("previous_softcap", "previous_sinks"),
    )
)


@register_method(
    "fastv",
    source="FastV, ECCV 2024; github.com/pkunlp-icler/FastV, the variants with a cache",
    summary="one prune at `layer`, by the attention of the last prompt token in the layer before",
)
def fastv(*, layer: int = 2, keep: int | float = 0.5) -> Fields:
    """Keep so many tokens an image, or a share of them, rounded as Python rounds."""
    return {"prune": pairs([layer], [keep]), "score": "previous_layer", "rounding": "half_even"}
