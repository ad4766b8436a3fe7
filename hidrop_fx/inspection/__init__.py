"""Look into a compiled model: `inspect`, `explain`, `compare`, `dump`, `replay`, `heatmap`, `measure`."""

from hidrop_fx.inspection.comparison.layer_by_layer import compare
from hidrop_fx.inspection.comparison.result import Comparison
from hidrop_fx.inspection.counted_launches import count_launches
from hidrop_fx.inspection.dumps.folder import dump
from hidrop_fx.inspection.heatmaps.filter_layers import heatmap
from hidrop_fx.inspection.replays.result import Replay
from hidrop_fx.inspection.replays.stage_by_stage import replay
from hidrop_fx.inspection.report.dry_run import explain
from hidrop_fx.inspection.report.explanation import Explanation
from hidrop_fx.inspection.report.last_call import inspect
from hidrop_fx.inspection.report.records import BodyReport, LayerReport, Totals
from hidrop_fx.inspection.report.snapshot import Inspection
from hidrop_fx.inspection.timing import Measurement, measure

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
    "count_launches",
    "dump",
    "explain",
    "heatmap",
    "inspect",
    "measure",
    "replay",
]
