"""Recompute the attention of a few query rows beside a layer that runs fused attention.

    q = rope(q_norm(q_proj(normed[rows]))) ; k = rope(k_norm(k_proj(normed)))
    softmax(q @ k.T * scaling + mask)                       # fp32, [B, H, Q, S]

Projections, norms, RoPE function and tables are the layer's own, so the rows are those that eager
attention would return.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.ops.attention import repeat_heads


def query_attention(
    attention: Any, normed: Tensor, cos: Tensor, sin: Tensor, queries: Tensor, valid: Tensor
) -> Tensor:
    """Compute the attention of the query rows over all columns, under the layer's own causal or sliding mask.

    Args:
        attention: the layer's `self_attn`.
        normed: its input [B, S, D].
        cos, sin: RoPE tables [B or 1, S, d].
        queries: int64 [B, Q], -1 for none.
        valid: bool [B, S], false for padding.

    Returns:
        fp32 [B, H, Q, S]; a row of zeros where `queries` is -1.
    """
    batch, length, _ = normed.shape
    rows = queries.clamp(min=0)
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    key = _project(attention, "k", normed)
    key = _rotated(attention, key, cos, sin)
    picked = torch.arange(batch, device=normed.device)[:, None]
    query = _project(attention, "q", normed[picked, rows])
    query = _rotated(attention, query, cos[picked, rows], sin[picked, rows])

    key = repeat_heads(key, query.shape[1] // key.shape[1])
    logits = query.float() @ key.float().transpose(2, 3) * attention.scaling
    columns = torch.arange(length, device=normed.device)
    distance = rows[:, :, None] - columns
    visible = (distance >= 0) & valid[:, None, :]
    window = sliding_window(attention)
    if window is not None:
        visible &= distance < window
    weights = logits.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1)
    return weights.masked_fill((queries < 0)[:, None, :, None], 0.0)


def sliding_window(attention: Any) -> int | None:
    """Read the sliding window of one attention: Qwen keeps it in the layer, Mistral in its config."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
    else:
        window = getattr(attention.config, "sliding_window", None)
    return window


def vision_attention(weights: Tensor, queries: Tensor, columns: Tensor) -> Tensor:
    """Average the attention to each vision token over the query rows, head by head.

    Args:
        weights: [B, H, Q, S].
        queries: [B, Q], -1 for none.
        columns: int64 [B, V], columns of the vision tokens, S where a row has fewer.

    Returns:
        [B, H, V], zero where there is no token.
    """
    count = (queries >= 0).sum(dim=1).clamp(min=1)
    mean = weights.sum(dim=2) / count[:, None, None]
    mean = torch.cat([mean, mean.new_zeros(*mean.shape[:2], 1)], dim=-1)
    return mean.gather(2, columns[:, None].expand(-1, mean.shape[1], -1))


def _project(attention: Any, which: str, hidden: Tensor) -> Tensor:
    """Project hidden states [B, S, D] to queries or keys before RoPE, [B, heads, S, d]."""
    projected: Tensor = getattr(attention, f"{which}_proj")(hidden)
    projected = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None:
        projected = norm(projected)
    return projected.transpose(1, 2)


def _rotated(attention: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    module = sys.modules[type(attention).__module__]
    rotate = getattr(module, "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnsupportedModelError(
            f"{module.__name__}, where {type(attention).__name__} is defined, has no "
            "apply_rotary_pos_emb; its attention cannot be recomputed"
        )
    rotated: Tensor = rotate(states, states, cos, sin)[0]
    return rotated
