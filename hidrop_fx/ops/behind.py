"""Tokens of a later turn's prompt, behind those that a cache holds.

mask = seen_behind(columns, shown)                                  # bool [B, 1, S, P + S]
out = attention_behind(query, key, value, past_keys, past_values, mask, scale)
scores = of_new(score(query, with_past(past_keys, key), columns_behind(shown, columns, table), ...), shown)
"""

import torch
from torch import Tensor

from hidrop_fx.ops.attention import attention_over


def seen_behind(columns: Tensor, shown: Tensor) -> Tensor:
    """Compute which tokens each of a turn sees: all of the past that are shown, and its own turn's up to itself.

    Args:
        columns: int64 [B, S], columns of the turn, ascending, the sentinel's in place of absent tokens.
        shown: bool [B, P], tokens of the past that may be seen.

    Returns:
        bool [B, 1, S, P + S]
    """
    own = columns[:, None, :] <= columns[:, :, None]
    past = shown[:, None, :].expand(-1, columns.shape[1], -1)
    return torch.cat([past, own], dim=2)[:, None]


def attention_behind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    mask: Tensor,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention of a turn's tokens [B, H, S, d] over keys and values [B, G, P, d] of the past and their own.

    Args:
        mask: bool [B, 1, S, P + S], true where a query may look.
    """
    keys, values = with_past(past_keys, key), with_past(past_values, value)
    return attention_over(query, keys, values, mask, scale, dropout, softcap, sinks)


def with_past(past: Tensor, states: Tensor) -> Tensor:
    """Return keys or values [B, G, P, d] of the past, and behind them those of a turn [B, G, S, d]."""
    return torch.cat([past, states.to(past.dtype)], dim=2)


def columns_behind(shown: Tensor, columns: Tensor, table: Tensor) -> Tensor:
    """Return columns [B, P + S] as a score is given them: -1 for the past that is shown, the sentinel for what is hidden.

    Args:
        shown: bool [B, P]. columns: int64 [B, S]. table: [B, L + 1], any by column.
    """
    past = torch.where(shown, -1, table.shape[1] - 1)
    return torch.cat([past, columns], dim=1)


def of_new(scores: Tensor, shown: Tensor) -> Tensor:
    """Return the scores [B, S] of a turn's own tokens, of scores [B, P + S]."""
    return scores[:, shown.shape[1] :]


def last_present(columns: Tensor, wanted: Tensor, table: Tensor) -> Tensor:
    """Find in a segment the last vision token at or before each column: the column itself where there is none.

    Args:
        columns: int64 [B, S], ascending. wanted: int64 [B, Q], -1 for none. table: bool [B, L + 1], true for vision tokens.

    Returns:
        int64 [B, Q], columns of the segment; -1 for none.
    """
    own = table.gather(1, columns)
    before = own[:, None, :] & (columns[:, None, :] <= wanted[:, :, None])
    found = torch.where(before, columns[:, None, :], -1).amax(dim=2)
    return torch.where((wanted >= 0) & (found >= 0), found, wanted)
