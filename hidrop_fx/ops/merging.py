"""Merge the tokens that a prune drops into tokens that it keeps, so that what they hold is not lost.

    nearest = [max(kept, key=lambda j: cosine(key[i], key[j])) for i in dropped]
    hidden[j] = mean(hidden[j], *(hidden[i] for i in dropped if nearest[i] == j))

A segment is what `ops.tokens` says: hidden states, and ascending columns with the sentinels last.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hidrop_fx.ops.attention_scores import no_autocast
from hidrop_fx.ops.tokens import find_columns, lookup, take_tokens


def merge_nearest_key(
    hidden: Tensor, keys: Tensor, columns: Tensor, kept: Tensor, index: Tensor, is_vision: Tensor
) -> Tensor:
    """Compute the hidden states [B, T, D] of the tokens that stay, with those that are dropped merged into them.

    Each vision token that is dropped goes to the vision token of its row that stays and whose key is nearest to its
    own, by the cosine of the keys of all heads side by side; of equals to the one of the lowest column. A token that
    stays becomes the mean of itself and of those that went to it, each counted once, whatever was merged into them
    before. Text takes nothing in; in a row that keeps no vision token, those that are dropped are lost.

    Gradients pass through the mean, and none through the choice.

    Args:
        hidden: [B, S, D], before the prune.
        keys: [B, G, S, d], rotated.
        columns: int64 [B, S], before the prune.
        kept: int64 [B, T], columns of those that stay.
        index: int64 [B, T], their places among the S.
        is_vision: bool [B, L + 1], by column.
    """
    flat = keys.detach().float().transpose(1, 2).flatten(2)
    unit = normalize(flat, dim=-1)
    with no_autocast(keys.device.type):  # the choice hangs on small differences
        nearness = take_tokens(unit, index) @ unit.transpose(1, 2)
    takes = lookup(is_vision, kept)[:, :, None]
    nearest = nearness.masked_fill(~takes, float("-inf")).argmax(dim=1)  # the first of equals
    place = find_columns(kept, columns)
    dropped = lookup(is_vision, columns) & (kept.gather(1, place) != columns)
    places = torch.arange(kept.shape[1], device=kept.device)
    member = (nearest[:, None] == places[:, None]) & dropped[:, None] & takes
    # Not times zero, which would make NaN of what a pad may hold. A product, since sums of scattered rows come
    # in another order each time on CUDA.
    lost = hidden.masked_fill(~dropped[:, :, None], 0.0)
    with no_autocast(keys.device.type):
        sums = member.to(hidden.dtype) @ lost
    size = 1 + member.sum(dim=2)
    merged = (take_tokens(hidden, index).float() + sums.float()) / size[:, :, None]
    return merged.to(hidden.dtype)
