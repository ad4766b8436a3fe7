"""Results of one call of the decoder."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hidrop_fx.runtime.kv.cache import HidropCache

Rows = Literal["all", "last", "text"]


@dataclass(kw_only=True)
class DecoderOutput:
    """Results of one call of the decoder."""

    hidden: Tensor
    """[B, L, D], zero where no token came through; [B, 1, D] where only the last row was wanted;
    [B, T, D] where only text was."""
    columns: Tensor | None
    """Columns [B, T] of `hidden` where it holds the text stream alone; invalid rows have the sentinel L."""
    cache: HidropCache | None
    features: dict[str, Tensor]
    """Vision features [tokens, D] by kind, "image" or "video"; of kinds that the call has."""
    hidden_states: tuple[Tensor, ...] | None = None
    """The first layer's input, the others' outputs, and `hidden` of all rows: [B, L, D], zero for
    tokens that a layer did not see. Where they are asked for."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Outputs that custom passes added, by name."""
