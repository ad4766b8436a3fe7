"""A schedule as data: events, segments, layer tokens; its costs; the layout of a batch under it."""

from hidrop_fx.planning.cluster import Cluster
from hidrop_fx.planning.costs import Costs, Run, Sample
from hidrop_fx.planning.events import Event
from hidrop_fx.planning.from_model import DEFAULT_TEXT_TOKENS, plan
from hidrop_fx.planning.plan import LayerCut, LayerTokens, Plan, Segment
from hidrop_fx.planning.roofline import DEVICES, Device, Roofline
from hidrop_fx.planning.scale_out import ScaleOut

__all__ = [
    "DEFAULT_TEXT_TOKENS",
    "DEVICES",
    "Cluster",
    "Costs",
    "Device",
    "Event",
    "LayerCut",
    "LayerTokens",
    "Plan",
    "Roofline",
    "Run",
    "Sample",
    "ScaleOut",
    "Segment",
    "plan",
]
