"""SparseVLM: text that is near the image rates vision tokens; the best of what is dropped is recycled, or nothing is."""

from collections.abc import Sequence
from typing import Any

from hidrop_fx.errors import ScheduleError
from hidrop_fx.methods.published import Fields, pairs, register_method
from hidrop_fx.methods.queries import behind_images
from hidrop_fx.methods.registry import Deferred, register_scorer

KEEPS: dict[str, dict[int, tuple[int, ...]]] = {
    "v15": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Version -> the authors' name of a budget -> tokens that their three prunes keep, recycled ones aside."""
HEADS = 14
GRAVITY = "gravity_raters"
"""The score of version 2, which reads RoPE's tables and chooses among heads."""
_ROWS = ("previous_query", "previous_key", "columns")
_SOFTMAX = ("previous_softcap", "previous_sinks")

register_scorer(
    "raters",
    queries=behind_images,
    averages_heads=True,
    differentiable=False,
    least_dropped=1,
    summary="attention in the layer before of the text behind the image whose embedding is nearest to the image's",
)(
    Deferred(
        "hidrop_fx.ops.text_raters:rater_scores",
        (*_ROWS, "query_columns", "raters", "previous_scale"),
        _SOFTMAX,
    )
)
register_scorer(
    GRAVITY,
    queries=behind_images,
    differentiable=False,
    least_dropped=1,
    summary="as `raters`, over what RoPE alone makes of the distance, of the heads that attend most to the image",
)(
    Deferred(
        "hidrop_fx.ops.text_raters:gravity_scores",
        (
            *(*_ROWS, "is_vision", "query_columns", "raters"),
            *("previous_cos", "previous_sin", "previous_scale"),
        ),
        _SOFTMAX,
        {"heads": HEADS},
    )
)


@register_method(
    "sparsevlm",
    source="SparseVLM, ICML 2025; github.com/Gumpest/SparseVLMs, branch main, USE_VERSION 1_0 or 2_0",
    summary="prunes by the attention of text near the image; the best of the dropped stay as a few means (v15), or none (v2)",
)
def sparsevlm(
    *,
    layers: Sequence[int] = (3, 7, 16),
    keeps: Sequence[int | float] | None = None,
    retain: int | None = None,
    version: str = "v15",
    heads: int | None = None,
) -> Fields:
    """Keep so many tokens an image, or those of the authors' budget `retain`, 128 by default; `heads` score in v2.

    Raises:
        ScheduleError: no such version or budget, or arguments that exclude each other.
    """
    if not isinstance(version, str) or version not in KEEPS:
        raise ScheduleError(f"version={version!r}; use one of {', '.join(map(repr, KEEPS))}")
    budgets = KEEPS[version]
    if retain is not None and (not isinstance(retain, int) or retain not in budgets):
        raise ScheduleError(
            f"retain={retain!r}; use one of {', '.join(map(str, budgets))}, or give keeps"
        )
    if keeps is not None and retain is not None:
        raise ScheduleError(
            f"keeps={keeps!r} beside retain={retain!r}, which stands for keeps={budgets[retain]!r}: give one "
            "of the two"
        )
    if keeps is None:
        keeps = budgets[128 if retain is None else retain]
    fields: dict[str, Any] = {"prune": pairs(layers, keeps)}
    if version == "v15":
        if heads is not None:
            raise ScheduleError(
                f"heads={heads!r}: all heads score in version 'v15'; leave heads out, or use version='v2'"
            )
        return fields | {"score": "raters", "positions": "compact", "merge": "recycle"}
    heads = HEADS if heads is None else heads
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ScheduleError(f"heads={heads!r} is not a number of attention heads; use an int >= 1")
    return fields | {"score": f"{GRAVITY}(heads={heads})"}
