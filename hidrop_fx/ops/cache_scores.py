"""Scores of cached tokens by KV head: attention of the last tokens, norms of values, diversity of keys.

attention  = pool(mean over the group and the window of softmax(query @ key.T))     # SnapKV
importance = attention + |value|                                                    # MixKV, each brought to one scale
score      = r * diversity + (1 - r) * importance,   r = mean cosine of two keys of the head
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hidrop_fx.ops.attention_scores import no_autocast
from hidrop_fx.ops.explicit_attention import attention_logits, softmax_beside

# As MixKV's code has it, where a head's cosines are alike.
_EPSILON = 1e-8
# Its weight of each score in the variant "mixkv".
_ALIKE = 0.33


def window_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    past: Tensor,
    real: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    kernel: int,
    pooling: str,
    heads: str,
    variant: str = "attn",
) -> Tensor:
    """Score the tokens before the window for each KV head, all in fp32.

    Args:
        query: [B, H, W, d], rotated, of the last tokens of each row.
        key: [B, G, S, d], rotated; H is a multiple of G. value: [B, G, S, e].
        seen: bool [B, 1, W, S], the tokens that each query sees.
        past: bool [B, S], the tokens before the window. real: bool [B, S], all but padding.
        kernel: tokens that a score is pooled over, odd; `pooling`: "avg" or "max" of them.
        heads: "mean" or "max" over the query heads of a KV head, before pooling.
        variant: "attn" (SnapKV), "mixkv" or "headwisemixkv".

    Returns:
        fp32 [B, G, S]; anything where `past` is false.
    """
    candidates = past[:, None]
    with no_autocast(query.device.type):
        attention = _window_attention(query, key, seen, scale, softcap, sinks, heads)
        # The window is no neighbour of the tokens before it: a pool reaches into zeros there.
        attention = _pooled(attention * candidates, kernel, pooling)
        if variant == "attn":
            return attention
        cosines, redundancy = _key_cosines(key.float(), real)
        level = _mean(attention, candidates)
        diversity = _rescaled(-cosines, candidates, level, _EPSILON)
        norms = _rescaled(value.float().norm(dim=-1), candidates, level, 0.0)
    if variant == "mixkv":
        return _ALIKE * diversity + _ALIKE * attention + _ALIKE * norms
    return redundancy * diversity + (1 - redundancy) * (attention + norms)


def _window_attention(
    query: Tensor,
    key: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    heads: str,
) -> Tensor:
    """Return the attention that the window pays to each token, by KV head: fp32 [B, G, S]."""
    logits = attention_logits(query.float(), key.float(), scale, softcap)
    lowest = torch.finfo(logits.dtype).min  # a row of padding sees nothing, and stays a number
    weights = softmax_beside(logits.masked_fill(~seen, lowest), sinks).mean(dim=2)
    groups = weights.shape[1] // key.shape[1]
    grouped = weights.unflatten(1, (key.shape[1], groups))
    return grouped.mean(dim=2) if heads == "mean" else grouped.amax(dim=2)


def _pooled(scores: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pool each score [B, G, S] with its neighbours; those beyond the ends are zero, and count."""
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    return pool(scores, kernel_size=kernel, stride=1, padding=kernel // 2)


def _key_cosines(key: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product of each normalised key with their mean [B, G, S], and the mean cosine of two keys [B, G, 1]."""
    count = real.sum(dim=1)[:, None, None].to(key.dtype)
    unit = F.normalize(key, dim=-1) * real[:, None, :, None]
    mean = unit.sum(dim=2, keepdim=True) / count[..., None]
    squared = mean.square().sum(dim=-1)
    redundancy = (count * squared - 1) / (count - 1).clamp(min=1)
    return (unit * mean).sum(dim=-1), redundancy


def _rescaled(scores: Tensor, candidates: Tensor, level: Tensor, epsilon: float) -> Tensor:
    """Bring scores [B, G, S] to [0, 1] over the candidates, then to a mean of `level` [B, G, 1]."""
    low = scores.masked_fill(~candidates, float("inf")).amin(dim=-1, keepdim=True)
    high = scores.masked_fill(~candidates, float("-inf")).amax(dim=-1, keepdim=True)
    spread = high - low + epsilon
    unit = (scores - low) / torch.where(spread > 0, spread, 1.0)  # alike: none is preferred
    return unit * (level / (_mean(unit, candidates) + _EPSILON))


def _mean(scores: Tensor, candidates: Tensor) -> Tensor:
    """Return the mean over the candidates, [B, G, 1]."""
    count = candidates.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(candidates, scores, 0.0).sum(dim=-1, keepdim=True) / count
