"""Attention that no fused kernel computes as it stands: capped logits, and sinks that share in the softmax.

    logits  = softcap * tanh(query @ key.T * scale / softcap)          # Gemma 2
    weights = softmax([logits, sink of the head])[..., :-1]            # GPT-OSS

A cap stands between two products, so both are written out. A sink is one more key, and fits in a fused call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Fused kernels want head widths that are multiples of this.
_ALIGNMENT = 8


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention as two matrix products, with a softmax in fp32 over capped logits and sinks.

    Args:
        query: [B, H, S, d].
        key, value: [B, G, T, d] and [B, G, T, e]; H is a multiple of G.
        mask: bool [B or 1, 1, S, T], true where a query may look; None for causal attention.
        softcap: bound of the logits.
        sinks: [H], a logit of each head that takes its share of the weights.

    Returns:
        [B, H, S, e]
    """
    if mask is None:
        places = torch.arange(query.shape[2], device=query.device)
        mask = (places[None, :] <= places[:, None])[None, None]
    logits = attention_logits(query, key, scale, softcap)
    weights = softmax_beside(logits.masked_fill(~mask, torch.finfo(logits.dtype).min), sinks)
    if dropout:
        weights = F.dropout(weights, dropout)
    batch, heads, rows, tokens = weights.shape
    folded = weights.to(value.dtype).reshape(batch, value.shape[1], -1, tokens)
    return torch.matmul(folded, value).reshape(batch, heads, rows, value.shape[3])


def attention_logits(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute the logits of query [B, H, Q, d] and key [B, G, S, d], fp32 [B, H, Q, S]."""
    batch, heads, rows, width = query.shape
    # The queries of a group become rows of one head: keys are read once, never repeated.
    folded = query.reshape(batch, key.shape[1], heads // key.shape[1] * rows, width)
    logits = torch.matmul(folded, key.transpose(2, 3)).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.reshape(batch, heads, rows, key.shape[2])


def softmax_beside(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of logits [B, H, Q, S] over the last dimension, sinks [H] taking their share."""
    if sinks is None:
        return logits.softmax(dim=-1)
    column = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], dim=-1).softmax(dim=-1)[..., :-1]


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    sinks: Tensor,
) -> Tensor:
    """Compute attention with sinks in one fused call, as one more key in front, whose value is zero.

    Heads grow by a few dimensions: 1 in the new key, the sink's logit in every query. A query goes in
    front too, so that the plain causal form still fits.

    Args:
        mask: bool [B or 1, 1, S, S], true where a query may look; None for causal attention.
        sinks: [H], a logit of each head.
    """
    width, out = query.shape[3], value.shape[3]
    # The logit is split in two numbers, since 16 bits hold one of them badly.
    wanted = sinks.float() / scale
    high = wanted.detach().to(query.dtype)
    low = (wanted - high.float()).to(query.dtype)
    logit = torch.stack([high, low], dim=-1)[None, :, None].expand(*query.shape[:3], 2)
    rest = -(width + 2) % _ALIGNMENT
    query = F.pad(torch.cat([query, logit], dim=3), (0, rest, 1, 0))
    front = F.pad(key.new_ones(2), (width, rest)).expand(*key.shape[:2], 1, -1)
    key = torch.cat([front, F.pad(key, (0, 2 + rest))], dim=2)
    value = F.pad(value, (0, query.shape[3] - out, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0, 1, 0), value=True)
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[:, :, 1:, :out]
