"""Choose or merge the tokens of images before the decoder: [E, n, D] of E images -> places int64 [E, keep], rows or None.

Greedy choices take one token after another, as many steps as tokens stay; of equals the lower place wins.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize, one_hot

from hidrop_fx.ops.attention_scores import no_autocast

Reduced = tuple[Tensor, Tensor | None]


class TowerTokens(NamedTuple):
    """E images in the vision tower, at the layer whose outputs the projector takes."""

    hidden: Tensor
    """[E, n, V], its output for the patches."""
    cls: Tensor | None
    """[E, 1, V], its output for the class token, where there is one."""
    attention: Tensor
    """fp32 [E, n]: what the class token pays to each patch, summed over heads; without one, what all patches pay
    to it."""
    keys: Tensor
    """[E, n, d], its keys, mean over heads."""


@torch.no_grad()
def max_min_diversity(features: Tensor, keep: int, *, ratio: float = 0.098) -> Reduced:
    """Choose the tokens that are farthest, by cosine distance, from those chosen before: DivPrune.

    The first is the one whose nearest other token is farthest. `ratio` is what `keep` was made from.
    """
    unit = normalize(features.float(), dim=-1)
    distance = 1 - _cosines(unit, unit)
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    chosen = [distance.masked_fill(itself, math.inf).amin(dim=2).argmax(dim=1)]
    nearest = _rows(distance, chosen[0])
    for _ in range(keep - 1):
        nearest = nearest.scatter(1, chosen[-1][:, None], -math.inf)
        chosen.append(nearest.argmax(dim=1))
        nearest = torch.minimum(nearest, _rows(distance, chosen[-1]))
    return torch.stack(chosen, dim=1).sort(dim=1).values, None


@torch.no_grad()
def conditional_diversity(
    features: Tensor, keep: int, *, text: Tensor, tokens: int = 64, relevance: float = 0.5
) -> Reduced:
    """Choose by the greedy MAP of a determinantal point process, whose kernel is quality x cosine x quality: CDPruner.

    Quality is exp(alpha r), alpha = relevance / (2 (1 - relevance)); r is the cosine to the row's text tokens, mean over
    them, scaled to [0, 1] over the image. `tokens` is what `keep` was made from.

    Args:
        text: fp32 [E, D], mean of the normalised embeddings of the row's text tokens.
    """
    unit = normalize(features.float(), dim=-1)
    near = _cosines(unit, text[:, None])[:, :, 0]
    low, high = near.amin(dim=1, keepdim=True), near.amax(dim=1, keepdim=True)
    quality = torch.exp(relevance / (2 * (1 - relevance)) * (near - low) / (high - low + 1e-6))
    kernel = quality[:, :, None] * _cosines(unit, unit) * quality[:, None, :]
    gain = kernel.diagonal(dim1=1, dim2=2)
    directions: list[Tensor] = []
    chosen: list[Tensor] = []
    for _ in range(keep):
        best = gain.argmax(dim=1)
        row = _rows(kernel, best)
        for each in directions:
            row = row - each.gather(1, best[:, None]) * each
        row = (
            row / (gain.gather(1, best[:, None]).clamp(min=0) + 1e-5).sqrt()
        )  # rounding may go below
        directions.append(row)
        chosen.append(best)
        gain = (gain - row.square()).scatter(1, torch.stack(chosen, dim=1), -math.inf)
    return torch.stack(chosen, dim=1).sort(dim=1).values, None


def pooled_grid(features: Tensor, keep: int, *, tokens: int = 144) -> Reduced:
    """Average a square grid to a smaller one; each average stands where the middle of its cell is.

    `tokens` is what `keep` was made from.
    """
    entries, count, width = features.shape
    side, smaller = math.isqrt(count), math.isqrt(keep)
    grid = features.transpose(1, 2).reshape(entries, width, side, side)
    rows = adaptive_avg_pool2d(grid, smaller).flatten(2).transpose(1, 2)
    middle = (torch.arange(smaller, device=features.device) * 2 + 1) * side // (2 * smaller)
    places = (middle[:, None] * side + middle).flatten()
    return places.expand(entries, -1), rows


def merged_by_tower(
    features: Tensor, keep: int, *, tower: TowerTokens, dominant: int = 54, contextual: int = 10
) -> Reduced:
    """Choose what the class token attends to, and merge what is left into evenly spaced tokens: VisionZip.

    The class token itself is one of the dominant, and comes first; then the other dominant in order, then the merged
    ones: each its own state plus the mean of those whose keys are nearest to its key, by cosine. So rows are no longer in
    the order of the grid; they take the first places.

    Returns:
        places, and states of the tower [E, keep, V], for the projector.
    """
    hidden, count = tower.hidden, tower.hidden.shape[1]
    extra = 0 if tower.cls is None else 1
    top = min(dominant, keep) - extra
    chosen = tower.attention.topk(top, dim=1).indices
    is_chosen = torch.zeros_like(tower.attention, dtype=torch.bool).scatter(1, chosen, True)
    order = is_chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    best, rest = order[:, :top].sort(dim=1).values, order[:, top:].sort(dim=1).values
    parts = [_tokens(hidden, best)] if tower.cls is None else [tower.cls, _tokens(hidden, best)]
    merged = min(keep - min(dominant, keep), count - top)
    if merged:
        step = max(1, rest.shape[1] // merged)
        spaced = torch.arange(rest.shape[1], device=rest.device)
        is_target = (spaced % step == 0) & (spaced // step < merged)
        targets, others = rest[:, is_target], rest[:, ~is_target]
        keys = normalize(tower.keys.float(), dim=-1)
        nearest = _cosines(_tokens(keys, others), _tokens(keys, targets))
        member = one_hot(nearest.argmax(dim=2), merged).to(hidden.dtype)
        sums = member.transpose(1, 2) @ _tokens(hidden, others)
        means = sums / member.sum(dim=1)[:, :, None].clamp(min=1)
        parts.append(_tokens(hidden, targets) + means)
    rows = torch.cat(parts, dim=1)
    places = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
    return places, rows


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the products [E, n, m] of rows of length one, in fp32 under autocast too: choices hang on small differences."""
    with no_autocast(a.device.type):
        return a @ b.transpose(1, 2)


def _rows(table: Tensor, chosen: Tensor) -> Tensor:
    """Take one row [E, n] of each image's table [E, n, n]."""
    return table.gather(1, chosen[:, None, None].expand(-1, 1, table.shape[2]))[:, 0]


def _tokens(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))
