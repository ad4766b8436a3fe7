"""Intra-modal similarity: the cosine of tokens' states before and after a layer.

    similarity[k] = mean over tokens of cos(output of layer k - 1, output of layer k)

Vision and text tokens apart (HiDrop, section 2). What goes into layer 0 are the embeddings and the
projected images. The last layer's output is taken before the decoder's final norm.
"""

import torch.nn.functional as F
from torch import Tensor

from hidrop_fx.analysis.measuring.averages import Averages


class Similarity:
    """Similarity by layer, vision and text tokens apart."""

    def __init__(self, num_layers: int) -> None:
        self.vision = Averages(num_layers)
        self.text = Averages(num_layers)

    def add(self, layer: int, before: Tensor, after: Tensor, vision: Tensor, text: Tensor) -> None:
        """Add one layer of one batch: states [B, L, D], masks bool [B, L]."""
        cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)
        self.vision.add(layer, cosines[vision])
        self.text.add(layer, cosines[text])
