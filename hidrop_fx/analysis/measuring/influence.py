"""Cross-modal influence: the change of text tokens' states when another image is shown.

    influence[k] = 1 - mean over tokens of cos(state under its own image, state under the reference)

State: the output of layer k. Tokens: the text behind a sample's first image, the only text that any
image can reach. The reference is the first image of the calibration data, for every sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hidrop_fx.analysis.data.samples import Samples
from hidrop_fx.analysis.measuring.averages import Averages


class Influence:
    """Influence by layer."""

    def __init__(self, num_layers: int) -> None:
        self._distances = Averages(num_layers)

    def add(self, layer: int, own: Tensor, reference: Tensor, tokens: Tensor) -> None:
        """Add one layer of one batch: states [B, L, D] under either image, tokens bool [B, L]."""
        cosines = F.cosine_similarity(own.float(), reference.float(), dim=-1)
        self._distances.add(layer, 1 - cosines[tokens])

    def result(self) -> tuple[float | None, ...]:
        """Return the means by layer; None where no sample has text behind an image."""
        return self._distances.result()


def text_behind_images(part: Samples) -> Tensor:
    """Mark text tokens behind the first image of their row, bool [B, L]."""
    return part.text & (part.vision.cumsum(dim=1) > 0)


def as_reference(reference: Tensor, tokens: int) -> Tensor:
    """Resize the reference image [n, D] to [tokens, D] by nearest tokens."""
    if len(reference) == tokens:
        return reference
    places = (
        (torch.arange(tokens, dtype=torch.float32, device=reference.device) + 0.5)
        * len(reference)
        / tokens
    )
    return reference[places.long()]
