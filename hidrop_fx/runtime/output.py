"""What one call of the decoder gives."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hidrop_fx.runtime.kv.cache import HidropCache

Rows = Literal["all", "last", "text"]


@dataclass(kw_only=True)
class DecoderOutput:
    """What one call of the decoder gives."""

    hidden: Tensor
    """[B, L, D], zero where no token came through; [B, 1, D] where only the last row was wanted;
    [B, T, D] where only text was."""
    columns: Tensor | None
    """Of `hidden`, where it holds the text stream alone: [B, T]; invalid rows have the sentinel L."""
    cache: HidropCache | None
    features: Tensor | None
    hidden_states: tuple[Tensor, ...] | None = None
    """What the first layer reads, what the others give, and `hidden` of all rows: [B, L, D], zero for
    tokens that a layer did not see. Where they are asked for."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What passes of the user returned beside."""
