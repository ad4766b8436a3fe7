"""Attention as one node: what capture records, and what the passes put in its place.

While a decoder is captured, every layer's attention is the opaque operator `hidrop::attention`.
It has no kernel: a pass replaces each one before anything runs, by

    causal_attention(q, k, v, ...)          # pads last, so no mask is needed
    masked_attention(q, k, v, mask, ...)    # sliding windows, bidirectional blocks
    explicit_attention(q, k, v, mask, ...)  # capped logits
    cached_attention(q, k, v, keys, values, slots, mask, ...)     # decode
    attention_over(q, extended(keys, slots, k), extended(values, slots, v), mask, ...)   # with gradients
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hidrop_fx.ops.explicit_attention import explicit_attention
from hidrop_fx.ops.masks import CHUNKED


@torch.library.custom_op("hidrop::attention", mutates_args=())
def captured_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Mark a decoder layer's attention in a captured graph: [B, H, S, d] x [B, G, S, e] -> [B, H, S, e]."""
    raise RuntimeError(
        "hidrop::attention marks an attention in a captured graph and has no kernel; run the "
        "`attention` or `kv_cache` pass before the graph"
    )


@captured_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    if value.shape[-1] == query.shape[-1]:
        return torch.empty_like(query)
    # In memory as fused kernels return it, head after head within a token.
    shape = (*query.shape[:-1], value.shape[-1])
    return query.new_empty(shape).transpose(1, 2).contiguous().transpose(1, 2)


CAPTURED_ATTENTION = torch.ops.hidrop.attention.default


class CapturedArguments(NamedTuple):
    """Arguments of a captured attention, those aside that it has by default."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    dropout: float
    sliding_window: int | None
    softcap: float | None = None
    """Bound of the logits."""
    sinks: fx.Node | None = None
    """[H], a logit of each head that takes its share of the weights."""

    @property
    def is_chunked(self) -> bool:
        """True where `sliding_window` is the size of chunks, within which tokens see each other."""
        return str(self.mask) == f"mask_{CHUNKED}"

    @classmethod
    def of(cls, node: fx.Node) -> "CapturedArguments":
        """Return the arguments of a captured attention."""
        return cls(*node.args, **node.kwargs)  # type: ignore[arg-type]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Compute causal attention without a mask tensor, the only form that reaches the flash kernels."""
    if query.device.type == "cuda" and query.dtype not in (torch.bfloat16, torch.float16):
        # The kernel left for fp32 takes no grouped heads: without it, all S x S weights would be in memory.
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def plain_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Compute causal attention as two matrix products and a softmax in fp32, to check the fused kernels by."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    logits = torch.matmul(query.float(), key.float().transpose(2, 3)) * scale
    places = torch.arange(query.shape[2], device=query.device)
    later = places[None, :] > places[:, None]
    weights = logits.masked_fill(later, float("-inf")).softmax(dim=-1)
    return torch.matmul(F.dropout(weights, dropout), value.float()).to(value.dtype)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Compute attention under a boolean mask [B, 1, S, S] (true where a query may look)."""
    groups = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query,
        repeat_heads(key, groups),
        repeat_heads(value, groups),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
    )


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write the new tokens' K and V into the filled part of a layer's buffers, attend over it.

    `keys` and `values` are [B, G, filled, d or e] views whose last places, `slots` [q], belong to the
    new tokens. `mask` is a boolean [B, 1, q, filled], or None when every row may see everything.
    """
    keys.index_copy_(2, slots, key.to(keys.dtype))
    values.index_copy_(2, slots, value.to(values.dtype))
    if softcap is not None or sinks is not None:
        return _explicit(query, keys, values, mask, scale, dropout, softcap, sinks)
    fused = query.shape[2] == 1 and query.device.type == "cpu" and torch.compiler.is_compiling()
    return _over_buffers(query, keys, values, mask, scale, dropout, fused=fused and not dropout)


def extended(buffer: Tensor, slots: Tensor, states: Tensor) -> Tensor:
    """Return keys or values [B, G, filled, d] with those of the new tokens at `slots` [q]; `buffer` stays as it is."""
    return buffer.index_copy(2, slots, states.to(buffer.dtype))


def attention_over(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention of new tokens over all keys and values [B, G, filled, d], their own included.

    `mask` is a boolean [B, 1, q, filled], or None when every row may see everything.
    """
    if softcap is not None or sinks is not None:
        return _explicit(query, keys, values, mask, scale, dropout, softcap, sinks)
    return _over_buffers(query, keys, values, mask, scale, dropout, fused=False)


def _explicit(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if mask is None:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    query = query.to(keys.dtype)  # under autocast the buffers keep the dtype of the model
    return explicit_attention(query, keys, values, mask, scale, dropout, softcap, sinks)


def _over_buffers(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    *,
    fused: bool,
) -> Tensor:
    query = query.to(keys.dtype)  # under autocast the buffers keep the dtype of the model
    batch, heads, tokens, width = query.shape
    groups = heads // keys.shape[1]
    # The queries of a group become rows of one head: keys and values are read once, never repeated.
    rows = query.reshape(batch, keys.shape[1], groups * tokens, width)
    if mask is not None:
        mask = mask.repeat(1, 1, groups, 1)
    if fused:
        attended = _fused_attention(rows, keys, values, mask, scale)
    else:
        attended = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    return attended.reshape(batch, heads, tokens, values.shape[3])


def _fused_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute attention of a few rows as products and sums, which Inductor makes two passes over memory.

    On a CPU the library's kernel works on blocks of queries: with one, and bf16, it was four to nine
    times slower. Not for eager mode, where every product would be kept.
    """
    logits = (query[:, :, :, None].float() * keys[:, :, None].float()).sum(dim=-1) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    weights = logits.softmax(dim=-1)
    return (weights[..., None] * values[:, :, None].float()).sum(dim=-2).to(values.dtype)


def repeat_heads(states: Tensor, groups: int) -> Tensor:
    """Repeat key-value heads: [B, G, S, d] -> [B, G * groups, S, d]; a masked call has no grouped kernel everywhere."""
    if groups == 1:
        return states
    batch, heads, tokens, width = states.shape
    states = states.unsqueeze(2).expand(batch, heads, groups, tokens, width)
    return states.reshape(batch, heads * groups, tokens, width)
