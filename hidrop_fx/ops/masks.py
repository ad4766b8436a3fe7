"""Attention masks by rule: computed from the columns of the tokens that a layer has, whichever these are.

    rule = MaskRule(window=512, blocks="within")
    mask = rule_mask(columns, blocks, rule.window, rule.blocks == "beyond")      # bool [B, 1, S, S]

No table of all columns by all columns is made, and a mask costs what its layer's tokens cost.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

BlockRule = Literal["within", "beyond"]
CHUNKED = "chunked_attention"
"""Name in `config.layer_types` of layers whose tokens see those of their own chunk alone."""


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """The tokens that a query of one captured mask sees, beside what is plain causal."""

    window: int | None = None
    """A query sees so many columns that end at its own; None for all before it."""
    chunk: int | None = None
    """A query sees the columns of its own chunk alone, which is so many long; the first begins at a row's first token."""
    blocks: BlockRule | None = None
    """Tokens of one block see each other both ways: within the window alone, or beyond it too."""
    floors: bool = False
    """A query sees no column before its floor."""

    def for_call(self, columns: int, *, blocks: bool, floors: bool = False) -> "MaskRule | None":
        """Return the part of the rule that a prompt calls for; None where that is plain causal.

        Args:
            columns: of the prompt.
            blocks: the prompt has a block.
            floors: some token of it has a floor.
        """
        if self.blocks is not None and blocks:
            return replace(self, floors=True) if floors else self
        window, chunk = (
            n if n is not None and columns > n else None for n in (self.window, self.chunk)
        )
        if window is None and chunk is None and not floors:
            return None
        return MaskRule(window=window, chunk=chunk, floors=floors)


def rule_mask(
    columns: Tensor,
    blocks: Tensor | None,
    window: int | None,
    beyond: bool = False,
    floors: Tensor | None = None,
    chunks: Tensor | None = None,
) -> Tensor:
    """Compute which tokens of a segment each of them sees, as transformers composes its overlays.

    Args:
        columns: int64 [B, S], the sentinel's in place of absent tokens.
        blocks: int64 [B, L + 1], the block of each column, -1 for none; None where no rule reads it.
        window: a query sees so many columns that end at its own.
        beyond: tokens of a block see each other wherever the window ends.
        floors: int64 [B, L + 1], the first column that each may see, not above its own; None for all.
        chunks: int64 [B, L + 1], the chunk of each column; None where all are seen.

    Returns:
        bool [B, 1, S, S]; every row sees itself.
    """
    queries, keys = columns[:, :, None], columns[:, None, :]
    seen = keys <= queries
    if blocks is None:
        same = None
    else:
        own = blocks.gather(1, columns)
        same = (own[:, :, None] == own[:, None, :]) & (own >= 0)[:, :, None]
    if same is not None and not beyond:
        seen = seen | same
    if window is not None:
        seen = seen & (keys > queries - window)
    if same is not None and beyond:
        seen = seen | same
    if floors is not None:
        seen = seen & (keys >= floors.gather(1, columns)[:, :, None])
    if chunks is not None:
        own = chunks.gather(1, columns)
        seen = seen & (own[:, :, None] == own[:, None, :])
    return seen[:, None]


def chunks_of(first: Tensor, length: int, size: int) -> Tensor:
    """Return the chunk of each column, int64 [B, length + 1], where the first begins at the columns `first` [B]."""
    columns = torch.arange(length + 1, device=first.device)
    return (columns - first[:, None]) // size


def reading_mask(
    queries: Tensor, keys: Tensor, window: int | None, chunks: Tensor | None = None
) -> Tensor:
    """Compute which tokens of one segment the tokens of another see, as far as a window or a chunk goes.

    Args:
        queries: int64 [B, T], keys: int64 [B, S], columns of the prompt; the sentinel's in place of absent tokens.
        chunks: int64 [B, L + 1], the chunk of each column; None where all are seen.

    Returns:
        bool [B, 1, T, S]
    """
    seen = keys[:, None, :] <= queries[:, :, None]
    if window is not None:
        seen = seen & (keys[:, None, :] > queries[:, :, None] - window)
    if chunks is not None:
        seen = seen & (chunks.gather(1, keys)[:, None] == chunks.gather(1, queries)[:, :, None])
    return seen[:, None]


def floors_of(first: Tensor, last: Tensor, length: int) -> Tensor:
    """Return the first column that each may see: `first` [B] for those behind `last` [B], the sentinel too, 0 for others.

    Returns:
        int64 [B, length + 1]
    """
    columns = torch.arange(length + 1, device=first.device)
    return torch.where(columns > last[:, None], first[:, None], 0)


def run_blocks(runs: Tensor) -> Tensor:
    """Number the runs of true in each row of bool [B, L]: int64 [B, L], -1 elsewhere."""
    before = torch.nn.functional.pad(runs, (1, 0))[:, :-1]
    return torch.where(runs, (runs & ~before).cumsum(dim=1) - 1, -1)
