"""What a compiled model does: `inspect` it, and `measure` how fast it answers."""

from hidrop_fx.inspection.measure import Measurement, measure
from hidrop_fx.inspection.report import BodyReport, Inspection, LayerReport, Totals, inspect

__all__ = [
    "BodyReport",
    "Inspection",
    "LayerReport",
    "Measurement",
    "Totals",
    "inspect",
    "measure",
]
