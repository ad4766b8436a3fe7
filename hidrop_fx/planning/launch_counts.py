"""Launches of a prefill and of a decode step, by run of layers, and the host's time for them.

    found = hidrop_fx.count_launches(model, costs)       # from the programs, which know transformers
    print(costs.on("h100", launches=found))

Data alone: what is counted, and held against the least time of the same work (`planning.roofline`).
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepLaunches:
    """Launches of one step through all layers."""

    runs: tuple[int, ...]
    """Of each run of layers, with the prunes at its inputs, before anything is fused."""
    between: int
    """Outside the layers: bookkeeping of tokens, masks, RoPE tables, the last norm."""
    head: int
    """Of the output head."""
    replay: int
    """In the place of all but the head's where the call is recorded: the graph, and the copies around it."""

    @property
    def total(self) -> int:
        """Launches of a call that is not recorded."""
        return sum(self.runs) + self.between + self.head

    @property
    def recorded(self) -> int:
        """Launches of a call that is replayed."""
        return self.replay + self.head

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON types."""
        return {**asdict(self), "total": self.total, "recorded": self.recorded}


@dataclass(frozen=True, kw_only=True)
class LaunchCounts:
    """Launches under a schedule, and without one."""

    prefill: StepLaunches
    decode: StepLaunches
    identity_prefill: StepLaunches
    identity_decode: StepLaunches

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON types."""
        return {
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "identity": {
                "prefill": self.identity_prefill.to_dict(),
                "decode": self.identity_decode.to_dict(),
            },
        }
