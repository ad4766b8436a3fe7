"""Attention of one row of a batch in the plain loop, written out rule by rule."""

from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture.layers import window_of
from hidrop_fx.capture.temperature import tempered
from hidrop_fx.ops.attention import masked_attention
from hidrop_fx.ops.explicit_attention import explicit_attention
from hidrop_fx.reference.cut import RowCut, seen_behind


class RowAttention:
    """Attention of one unpadded row, which keeps the queries, keys and values it was given."""

    columns: Tensor
    held: Tensor | None = None
    """Columns [n] of tokens that attention leaves as they are."""
    blocks: Tensor | None = None
    """The block of each of its tokens [n], where the layer knows them."""
    beyond: bool = False
    """Tokens of a block see each other beyond the window too."""
    first: int = 0
    """The row's first column, where its first chunk begins."""
    chunked: bool = False
    """Tokens see those of their own chunk alone, as long as the layer's window."""
    floors: Tensor | None = None
    """The first column that each of its tokens [n] sees, where there is one."""
    cut: RowCut | None = None
    """What the layer's cache keeps of the prompt, where there are tokens behind it."""
    left: Tensor | None = None
    """Columns [n] of the prompt that tokens behind it see, where a later prune has cut the layer's cache."""
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def attended(self) -> bool:
        """True if the layer that ran last attends."""
        return hasattr(self, "key")

    def forget(self) -> None:
        """Forget what the layer before read: the next may not attend."""
        for name in ("query", "key", "value"):
            vars(self).pop(name, None)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        self.scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        self.softcap, self.sinks = softcap, s_aux
        query = tempered(module, query)
        self.query, self.key, self.value = query, key, value
        distance = self.columns[:, None] - self.columns[None, :]
        visible = distance >= 0
        same = torch.zeros_like(visible)
        if self.blocks is not None:
            same = (self.blocks[:, None] == self.blocks) & (self.blocks >= 0)
        if not self.beyond:
            visible |= same
        window = window_of(module, sliding_window)
        if window is not None and self.chunked:
            chunk = (self.columns - self.first) // window
            visible &= chunk[:, None] == chunk
        elif window is not None:
            visible &= distance < window
        if self.beyond:
            visible |= same
        if self.floors is not None:
            visible &= self.columns >= self.floors[:, None]
        read = query, key, value
        if self.left is not None:
            new = self.columns > self.left.max()
            visible &= torch.isin(self.columns, self.left) | new | ~new[:, None]
        if self.cut is None:
            visible = visible[None, None]
        else:
            visible = seen_behind(
                self.cut, *read, visible, scale=self.scale, softcap=softcap, sinks=s_aux
            )
        if softcap is None and s_aux is None:
            out = masked_attention(*read, visible, self.scale)
        else:
            out = explicit_attention(*read, visible, self.scale, 0.0, softcap, s_aux)
        if self.held is not None:
            out = out.masked_fill(torch.isin(self.columns, self.held)[:, None], 0)
        return out.transpose(1, 2).contiguous(), None
