"""What one call of the decoder gives."""

from dataclasses import dataclass

from torch import Tensor

from hidrop_fx.runtime.cache import HidropCache


@dataclass(kw_only=True)
class States:
    """What one call of the decoder gives."""

    hidden: Tensor
    """[B, L, D], zero where no token came through; [B, 1, D] where only the last row was wanted."""
    cache: HidropCache | None
    features: Tensor | None
