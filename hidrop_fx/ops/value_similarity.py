"""IVC-Prune's choice: vision tokens like the question, like the seeds that are most like it, or at RoPE's extremes.

similarity = mean over KV heads of softmax(values @ values.T / sqrt(d))     # no mask, no RoPE
seeds      = best of mean(similarity[question])
foreground = best of mean(similarity[question and seeds])
kept       = seeds, foreground, best of mean(cos), best of mean(sin)
"""

import torch
from torch import Tensor

from hidrop_fx.ops.attention_scores import no_autocast
from hidrop_fx.ops.ivc_shares import COORDINATES, FOREGROUND, SEEDS
from hidrop_fx.ops.tokens import find_columns, ranks, take_keys


def value_similarity(
    previous_value: Tensor,
    columns: Tensor,
    is_vision: Tensor,
    is_real: Tensor,
    query_columns: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Score vision tokens that stay by their similarity to question and seeds, others -inf: fp32 [B, S].

    Args:
        previous_value: [B, G, S, d], of the layer before.
        columns: int64 [B, S], the sentinel for padding. is_vision, is_real: bool [B, S].
        query_columns: int64 [B, Q], the question's, -1 where a row has fewer.
        cos, sin: [B, S, d].
    """
    count = is_vision.sum(dim=1, keepdim=True)
    most = columns.shape[1] // 100 + 1  # seeds that a row may have
    asked = query_columns >= 0
    with no_autocast(previous_value.device.type):
        values = previous_value.float()
        places = find_columns(columns, query_columns.clamp(min=0))
        by_question = _similarity(values, places, is_real) * asked[:, :, None]
        total = by_question.sum(dim=1)
        seeds = _best(total, is_vision, _share(count, SEEDS).clamp(min=1))
        order = torch.where(seeds, 0, 1).argsort(dim=1, stable=True)[:, :most]
        chosen = seeds.gather(1, order)
        by_seeds = _similarity(values, order, is_real) * chosen[:, :, None]
        total = total + by_seeds.sum(dim=1)
        kept = seeds | _best(total, is_vision, _share(count, FOREGROUND))
    for table in (cos, sin):
        means = table.float().mean(dim=-1).expand_as(total)
        kept = kept | _best(means, is_vision, _share(count, COORDINATES))
    return torch.where(kept, total, float("-inf"))


def _similarity(values: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """Return the similarity of the tokens at `places` [B, Q] to all, [B, Q, S]: each row sums to one."""
    rows = take_keys(values, places)
    logits = rows @ values.transpose(2, 3) * values.shape[3] ** -0.5
    return logits.masked_fill(~real[:, None, None], float("-inf")).softmax(dim=-1).mean(dim=1)


def _share(count: Tensor, share: float) -> Tensor:
    """Round a share of each row's tokens [B, 1], halves to even."""
    return (count.double() * share).round().long()


def _best(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Return the `count` [B, 1] highest scores [B, S] among some tokens, the earlier winning a tie."""
    ranked = torch.where(among, scores, float("-inf"))
    return among & (ranks(ranked) < count)
