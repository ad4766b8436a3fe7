"""Cut a layer's keys and values: the last tokens of each row, and for each KV head the best of those before them.

    real  = real_tokens(columns, is_vision)             # bool [B, S]
    rows  = window_rows(real, window)                   # their places [B, W]
    score = ...                                         # fp32 [B, G, S]
    index = kept_places(score, real, past_tokens(real, window), keep, slots)
    keys, values = take_by_head(keys, index), take_by_head(values, index)

Tokens of a segment stand in the order of their columns, padding last (`ops.tokens`); so do those that are kept.
"""

import torch
from torch import Tensor

from hidrop_fx.ops.tokens import take_keys


def real_tokens(columns: Tensor, is_vision: Tensor) -> Tensor:
    """Return which tokens of a segment are none of padding: bool [B, S], from columns [B, S] and a table [B, L + 1]."""
    return columns < is_vision.shape[1] - 1


def window_rows(real: Tensor, window: int) -> Tensor:
    """Return the places [B, W] of the last tokens of each row; the first again where there are fewer."""
    last = torch.arange(-window, 0, device=real.device)
    return (real.sum(dim=1, keepdim=True) + last).clamp(min=0)


def past_tokens(real: Tensor, window: int) -> Tensor:
    """Return which tokens stand before the last `window` of their row: bool [B, S]."""
    places = torch.arange(real.shape[1], device=real.device)
    return places < real.sum(dim=1, keepdim=True) - window


def seen_causally(columns: Tensor, rows: Tensor) -> Tensor:
    """Return which tokens [B, S] those at `rows` [B, W] see: bool [B, 1, W, S]."""
    places = torch.arange(columns.shape[1], device=columns.device)
    return (places <= rows[:, :, None])[:, None]


def take_mask_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """Take the rows [B, W] of a mask [B, 1, S, S] -> [B, 1, W, S]."""
    index = rows[:, None, :, None].expand(-1, -1, -1, mask.shape[3])
    return mask.gather(2, index)


def kept_places(scores: Tensor, real: Tensor, past: Tensor, keep: Tensor, slots: Tensor) -> Tensor:
    """Return the places [B, G, n] of what each KV head keeps, ascending; S behind the `keep` [B] of a row.

    The tokens behind the past stay; of the past those with the highest `scores` [B, G, S] do, the earlier winning a tie.
    `slots` is arange(n).
    """
    lowest = torch.finfo(scores.dtype).min
    ranked = torch.where(past[:, None], scores.nan_to_num(nan=lowest), float("inf"))
    ranked = torch.where(real[:, None], ranked, float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    best = order.gather(2, slots.expand(*order.shape[:2], -1))
    return torch.where(slots < keep[:, None, None], best, order.shape[2]).sort(dim=-1).values


def held_places(columns: Tensor, floors: Tensor, slots: Tensor) -> Tensor:
    """Return the places [B, n] of the tokens at `columns` [B, S] that those behind the prompt see; S and more behind them.

    Args:
        floors: int64 [B, L + 1], the first column that each may see, at the sentinel that of tokens behind the prompt.
        slots: arange(n).
    """
    return (columns < floors[:, -1:]).sum(dim=1, keepdim=True) + slots


def held_columns(columns: Tensor, index: Tensor, floors: Tensor) -> Tensor:
    """Return the columns [B, n] of the tokens at `index`, of columns [B, S]; the sentinel at places that are none."""
    found = columns.gather(1, index.clamp(max=columns.shape[1] - 1))
    return torch.where(index < columns.shape[1], found, floors.shape[1] - 1)


def take_held(states: Tensor, index: Tensor) -> Tensor:
    """Gather keys or values [B, G, S, d] at the places [B, n]; some token's at places that are none."""
    return take_keys(states, index.clamp(max=states.shape[2] - 1))


def take_by_head(states: Tensor, index: Tensor) -> Tensor:
    """Gather keys or values [B, G, S, d] at the places [B, G, n] of each head; some token's at places that are none."""
    rows = index.clamp(max=states.shape[2] - 1)[..., None]
    return states.gather(2, rows.expand(-1, -1, -1, states.shape[3]))


def columns_at(columns: Tensor, index: Tensor, is_vision: Tensor) -> Tensor:
    """Return the columns [B, G, n] of the tokens at `index`, of columns [B, S]; the sentinel at places that are none."""
    sentinel = is_vision.shape[1] - 1
    found = columns[:, None].expand(-1, index.shape[1], -1)
    found = found.gather(2, index.clamp(max=columns.shape[1] - 1))
    return torch.where(index < columns.shape[1], found, sentinel)
