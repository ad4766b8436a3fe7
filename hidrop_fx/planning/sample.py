"""What costs are counted for, one sample and the batch that it is part of, and runs of layers that see the same tokens of it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, and the batch of its like that it is part of."""

    text_tokens: int
    vision_tokens: int
    """Before anything is reduced or pruned, over all its images."""
    entering: int | None = None
    """Those that a reducer has left, where they were counted; None for as many as it leaves of images of one size."""
    unseen: tuple[int, int] | None = None
    """Text and vision tokens before the bottleneck, where the schedule has one and they were counted; None for all vision
    tokens and no text."""
    images: int = 1
    units: int | None = None
    """Its tiles or frames, where an int keep counts those; None for as many as images."""
    batch_size: int = 1
    new_tokens: int = 0
    """Tokens to be generated: room for them is part of `kv_bytes`."""


@dataclass(frozen=True)
class Run:
    """Layers `start` .. `stop - 1` of a plan, which see the same number of tokens."""

    start: int
    stop: int
    vision_tokens: int
    reason: str
    """Kind of the event that opens it; "text" or "start" for the first layers, without or with vision
    tokens. Of several events at one layer the last counts."""

    @property
    def layers(self) -> str:
        """Its layers as text, e.g. "8-9"."""
        return f"{self.start}" if self.stop == self.start + 1 else f"{self.start}-{self.stop - 1}"
