"""Recompute the attention of a few query rows beside a layer that runs fused attention.

    q, k = what the layer hands to its attention function
    softmax(q[rows] @ k.T * scaling + mask)                  # fp32, [B, H, Q, S]

The layer's own code makes them, norms, RoPE and all, and says how its softmax goes (scale, soft cap, sinks, window), so
the rows are those that eager attention would return.
"""

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hidrop_fx.capture.export import attention_implemented_by
from hidrop_fx.capture.layers import window_of
from hidrop_fx.ops.explicit_attention import attention_logits, softmax_beside


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
    rows = queries.clamp(min=0)
    call = _call_of(attention, normed, cos, sin)
    picked = torch.arange(len(normed), device=normed.device)[:, None]
    query = call.query.transpose(1, 2)[picked, rows].transpose(1, 2)
    logits = attention_logits(query.float(), call.key.float(), call.scale, call.softcap)
    columns = torch.arange(normed.shape[1], device=normed.device)
    distance = rows[:, :, None] - columns
    visible = (distance >= 0) & valid[:, None, :]
    if call.window is not None:
        visible &= distance < call.window
    weights = softmax_beside(logits.masked_fill(~visible[:, None], float("-inf")), call.sinks)
    return weights.masked_fill((queries < 0)[:, None, :, None], 0.0)


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


class _Call(NamedTuple):
    """What a layer hands to its attention function."""

    query: Tensor
    key: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    window: int | None


class _CalledError(Exception):
    """The attention function was called."""


def _call_of(attention: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> _Call:
    """Run an attention module up to the call of its attention function."""
    found: list[_Call] = []

    def record(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        window = window_of(module, sliding_window)
        found.append(_Call(query, key, scale, softcap, s_aux, window))
        raise _CalledError

    tables = (cos.expand(len(normed), -1, -1), sin.expand(len(normed), -1, -1))
    with attention_implemented_by([attention.config], record), suppress(_CalledError):
        attention.forward(normed, position_embeddings=tables, attention_mask=None)
    return found[0]
