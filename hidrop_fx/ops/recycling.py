"""Recycle the best of the tokens that a prune drops: a few clusters of them, by density peaks, stay as their means.

pool     = best of the dropped, in the order of their scores
distance = |pool[i] - pool[j]| / sqrt(D)
density  = exp(-mean of squared distances to the c nearest, itself among them)
peak     = density * distance to the nearest that is denser (the largest of all, where none is)
centres  = c highest peaks, in that order
merged   = mean of those nearest to each centre
"""

import torch
from torch import Tensor

from hidrop_fx.ops.attention_scores import no_autocast
from hidrop_fx.ops.tokens import lookup, take_tokens


def recycled(
    hidden: Tensor,
    scores: Tensor,
    columns: Tensor,
    is_vision: Tensor,
    keep: Tensor,
    pool: Tensor,
    slots: Tensor,
    merged_columns: Tensor,
) -> Tensor:
    """Compute the hidden states [B, C, D] that stand for tokens which a prune drops.

    Gradients pass through the means, and none through the choice.

    Args:
        hidden: [B, S, D], before the prune. scores: fp32 [B, S]. columns: int64 [B, S].
        is_vision: bool [B, L + 1], by column.
        keep: int64 [B], vision tokens that stay.
        pool: int64 [B], dropped ones that are recycled. slots: arange(M), M at least as many.
        merged_columns: int64 [B, C], of the clusters; the sentinel L where a row has fewer.
    """
    ranked = torch.where(lookup(is_vision, columns), scores, float("-inf"))
    order = ranked.argsort(dim=1, descending=True, stable=True)
    places = (keep[:, None] + slots).clamp(max=columns.shape[1] - 1)
    tokens = take_tokens(hidden, order.gather(1, places))
    there = slots < pool[:, None]
    clusters = merged_columns < is_vision.shape[1] - 1
    members = _members(tokens.detach(), there, clusters)
    tokens = tokens.masked_fill(~there[:, :, None], 0.0)  # a pad may hold NaN
    share = members.float() / (members.sum(dim=2, keepdim=True) + 1e-6)
    with no_autocast(hidden.device.type):
        return (share @ tokens.float()).to(hidden.dtype)


def _members(tokens: Tensor, there: Tensor, clusters: Tensor) -> Tensor:
    """Return which tokens [B, M, D] each cluster holds, bool [B, C, M].

    Args:
        there: bool [B, M], tokens that are none of padding. clusters: bool [B, C], likewise.
    """
    size, count = tokens.shape[1], clusters.sum(dim=1)
    infinite = torch.inf
    both = there[:, :, None] & there[:, None]
    # Not by products: what cancels in them would order near tokens.
    exact = "donot_use_mm_for_euclid_dist"
    flat = tokens.float().masked_fill(~there[:, :, None], 0.0)
    distance = torch.cdist(flat, flat, compute_mode=exact) / tokens.shape[2] ** 0.5
    near = distance.masked_fill(~both, infinite).sort(dim=2).values
    nearest = torch.arange(size, device=tokens.device) < count[:, None, None]
    squares = torch.where(nearest, near.square(), 0.0).sum(dim=2)
    density = (-squares / count[:, None]).exp()
    denser = both & (density[:, None] > density[:, :, None])
    largest = distance.masked_fill(~both, 0.0).amax(dim=(1, 2))[:, None, None]
    apart = torch.where(denser, distance, largest).amin(dim=2)
    peak = torch.where(there, apart * density, -infinite)
    slots = torch.arange(clusters.shape[1], device=tokens.device).expand(len(tokens), -1)
    centres = peak.argsort(dim=1, descending=True, stable=True).gather(1, slots)
    to_centre = distance.gather(1, centres[:, :, None].expand(-1, -1, size))
    own = to_centre.masked_fill(~clusters[:, :, None], infinite).argmin(dim=1)
    # A centre is its own, whichever is as near.
    lead = torch.full_like(own, -1).scatter(1, centres, torch.where(clusters, slots, -1))
    own = torch.where(lead >= 0, lead, own)
    return (own[:, None] == slots[:, :, None]) & there[:, None] & clusters[:, :, None]
