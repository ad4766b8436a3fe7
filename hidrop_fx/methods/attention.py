"""Scores by the filter layer's own attention, for `hidrop_fx.ops.attention_scores` to compute."""

from hidrop_fx.methods.registry import Deferred

_READS = ("query", "key", "columns", "query_columns", "scale")
_WHERE_THERE = ("softcap", "sinks")

MEAN = Deferred("hidrop_fx.ops.attention_scores:attention_scores", _READS, _WHERE_THERE)
MEAN_SQUARE = Deferred(
    "hidrop_fx.ops.attention_scores:squared_attention_scores", _READS, _WHERE_THERE
)
