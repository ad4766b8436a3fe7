"""What a cache cut means to the plain loop: tokens behind the prompt see what each KV head keeps of it.

visible[head, new, prompt] &= prompt token is among those that the head keeps
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.methods.cache_cuts import Cut
from hidrop_fx.ops import cache_cut as ops


@dataclass(frozen=True, kw_only=True)
class RowCut:
    """The cut of one layer, for one row."""

    cut: Cut
    layer: int
    layers: int
    new: int
    """Tokens behind the prompt."""


def seen_behind(
    row: RowCut, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, **given: Any
) -> Tensor:
    """Return what each token sees, bool [1, H, S, S], where `visible` [S, S] is what it would see of a whole cache.

    Args:
        query: [1, H, S, d]. key: [1, G, S, d]. value: [1, G, S, e].
        given: scale, softcap and sinks, for the score.
    """
    prompt, cut = key.shape[2] - row.new, row.cut
    real = visible.new_ones(1, prompt)
    past, rows = ops.past_tokens(real, cut.window), ops.window_rows(real, cut.window)
    given |= {
        "query": query[:, :, rows[0]],
        "key": key[:, :, :prompt],
        "value": value[:, :, :prompt],
        "seen": visible[rows[0], :prompt][None, None],
        "past": past,
        "real": real,
    }
    arguments = (given[name] for name in cut.rule.reads)
    scores = cut.rule.function(*arguments, **cut.score_arguments)
    count = cut.kept(prompt, row.layer, row.layers)
    slots = torch.arange(count, device=key.device)
    kept = ops.kept_places(scores, real, past, slots.new_full((1,), count), slots)
    held = visible.new_zeros(key.shape[1], key.shape[2]).scatter_(1, kept[0], True)
    held[:, prompt:] = True
    behind = torch.arange(key.shape[2], device=key.device) >= prompt
    by_head = held.repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    return (visible & (by_head[:, None] | ~behind[:, None]))[None]
