"""See what a compiled model does: `inspect`, `explain`, `compare`, `dump`, `replay`, `heatmap`, `measure`."""

from hidrop_fx.inspection.comparing import compare
from hidrop_fx.inspection.comparison import Comparison
from hidrop_fx.inspection.dumping import dump
from hidrop_fx.inspection.explaining import Explanation, explain
from hidrop_fx.inspection.inspected import BodyReport, Inspection, LayerReport, Totals
from hidrop_fx.inspection.maps import heatmap
from hidrop_fx.inspection.measure import Measurement, measure
from hidrop_fx.inspection.replay_result import Replay
from hidrop_fx.inspection.replaying import replay
from hidrop_fx.inspection.report import inspect

__all__ = [
    "BodyReport",
    "Comparison",
    "Explanation",
    "Inspection",
    "LayerReport",
    "Measurement",
    "Replay",
    "Totals",
    "compare",
    "dump",
    "explain",
    "heatmap",
    "inspect",
    "measure",
    "replay",
]
