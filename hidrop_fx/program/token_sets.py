"""What passes know of the tokens that layers see: segments of the plan as nodes of the graph, tables of all columns, side branches."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.ops.masks import MaskRule
from hidrop_fx.planning import Segment


@dataclass(kw_only=True)
class SegmentNodes:
    """A segment of the plan as nodes of the graph."""

    planned: Segment
    length: int
    """Symbolic number of its tokens."""
    columns: fx.Node | None
    """[B, S]; None in decode, where a segment is one new token a row."""
    live_ins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Captured live-in that the layers share -> its value for these tokens."""

    @property
    def name(self) -> str:
        """Name of the planned segment, e.g. "prune_10"."""
        return self.planned.name

    @property
    def start(self) -> int:
        """The first layer that sees it."""
        return self.planned.start

    @property
    def reason(self) -> str:
        """Kind of the event that opens it; "text" for the first."""
        return self.planned.reason


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Values for every column of the prompt, which segments gather or compute theirs from."""

    rope: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    """Captured cos or sin -> its table."""
    masks: Mapping[fx.Node, MaskRule] = field(default_factory=dict)
    """Captured mask -> its rule; plain causal masks have none."""
    blocks: fx.Node | None = None
    """The block of each column, where a rule reads it."""
    floors: fx.Node | None = None
    """The first column that each may see, where a rule reads it."""
    chunks: Mapping[int, fx.Node] = field(default_factory=dict)
    """By the size of chunks that a rule reads: the chunk of each column."""


@dataclass(kw_only=True)
class Branch:
    """Layers beside the decoder's, on the tokens of one segment; what they attend to is kept nowhere."""

    segment: SegmentNodes
    regions: list[Region]
    """Of those that run as a whole; `layer` is the one at whose input they run."""
