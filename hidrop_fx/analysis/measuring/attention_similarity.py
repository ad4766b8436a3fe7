"""Inter-layer visual attention similarity: does what a layer attends to stay attended to?

    top = the K vision tokens with the highest score at layer l
    ILVAS(l, l + n, K) = mean over top of cos(a_l[token], a_(l+n)[token])

a_l[token] holds the token's attention from each head (mean over the query rows). Where it is high, tokens
that are dropped at layer l would not have been missed later (HiDrop: filter layers are its maxima).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hidrop_fx.analysis.measuring.averages import Averages

WINDOWS: tuple[int, ...] = (4, 8)
TOPS: tuple[int, ...] = (5, 10, 20, 50, 100, 200)


@dataclass(frozen=True, kw_only=True)
class IlvasCurve:
    """ILVAS over the layers, for one window and one number of tokens."""

    window: int
    """n: layers ahead that a layer is compared with."""
    top: int
    """K: vision tokens compared, those most attended at the layer itself."""
    values: tuple[float | None, ...]
    """By layer, in -1 .. 1; None where layer l + n does not exist or no sample has K tokens."""


class Ilvas:
    """ILVAS curves; the attention of the last `max(windows)` layers is kept."""

    def __init__(
        self,
        num_layers: int,
        windows: Sequence[int] = WINDOWS,
        tops: Sequence[int] = TOPS,
    ) -> None:
        self._windows = [window for window in windows if window < num_layers]
        self._tops = list(tops)
        self._means = {
            (window, top): Averages(num_layers) for window in self._windows for top in tops
        }
        self._recent: dict[int, Tensor] = {}

    def add(self, layer: int, attention: Tensor, counts: Tensor) -> None:
        """Add one layer of one batch, in order: attention [B, H, V], vision tokens of each row [B]."""
        for window in self._windows:
            if layer - window in self._recent:
                self._compare(layer - window, window, attention, counts)
        self._recent[layer] = attention
        self._recent.pop(layer - max(self._windows, default=0), None)

    def end_batch(self) -> None:
        """Forget the layers of the batch that is done."""
        self._recent.clear()

    def result(self) -> tuple[IlvasCurve, ...]:
        """Return every curve that some sample is large enough for."""
        curves = [
            IlvasCurve(window=window, top=top, values=means.result())
            for (window, top), means in self._means.items()
        ]
        return tuple(c for c in curves if any(value is not None for value in c.values))

    def _compare(self, layer: int, window: int, later: Tensor, counts: Tensor) -> None:
        earlier = self._recent[layer]
        cosines = F.cosine_similarity(earlier, later, dim=1)
        # Places without a token score zero; a stable order puts them behind tokens that score zero too.
        order = earlier.mean(dim=1).argsort(dim=1, descending=True, stable=True)
        ranked = cosines.gather(1, order)
        for top in self._tops:
            rows = counts >= top
            if rows.any():
                self._means[window, top].add(layer, ranked[rows, :top].mean(dim=1))
