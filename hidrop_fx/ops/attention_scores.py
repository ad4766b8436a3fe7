"""Attention of some query rows to every token of a segment, as a score of its tokens.

scores = mean over heads and rows of softmax(query @ key.T * scale)       # fp32 [B, S]
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hidrop_fx.ops.explicit_attention import attention_logits, softmax_beside


def attention_scores(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the attention that query rows pay to each token, averaged over heads and rows.

    Softmax over a query row's whole causal row, mean over heads, then over the query rows: the
    rule of PyramidDrop and HiDrop (`rank_drop` in their released code).

    Args:
        query: [B, H, Q, d], rotated.
        key: [B, G, S, d], rotated; H is a multiple of G.
        columns: int64 [B, S].
        query_columns: int64 [B, Q], -1 where a row of the batch has fewer than Q.
        scale: factor of the logits.
        softcap: bound of the logits, where the layer has one.
        sinks: [H], a logit of each head beside those of the tokens, where the layer has one.

    Returns:
        fp32 [B, S]
    """
    attention, weights = attention_of_rows(
        query, key, columns, query_columns, scale, softcap, sinks
    )
    return (attention.mean(dim=1) * weights).sum(dim=1)


def previous_attention_scores(
    previous_query: Tensor,
    previous_key: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    previous_scale: float,
    previous_softcap: float | None = None,
    previous_sinks: Tensor | None = None,
) -> Tensor:
    """Compute `attention_scores` of the layer before: FastV's rule, whose filter layer prunes by another's attention."""
    return attention_scores(
        previous_query,
        previous_key,
        columns,
        query_columns,
        previous_scale,
        previous_softcap,
        previous_sinks,
    )


def twig_attention_scores(
    twig_query: Tensor,
    twig_key: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    twig_scale: float,
    twig_softcap: float | None = None,
    twig_sinks: Tensor | None = None,
) -> Tensor:
    """Compute `attention_scores` of the last layer of a side branch: TwigVLM's rule."""
    return attention_scores(
        twig_query, twig_key, columns, query_columns, twig_scale, twig_softcap, twig_sinks
    )


def squared_attention_scores(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the mean square of that attention, which orders tokens as its root does.

    HiDrop's ablation compares with an "L2" score, and leaves it at that name.
    """
    attention, weights = attention_of_rows(
        query, key, columns, query_columns, scale, softcap, sinks
    )
    return (attention.square().mean(dim=1) * weights).sum(dim=1)


def attention_of_rows(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the attention fp32 [B, H, Q, S] of query rows, and weights [B, Q, 1] of the query rows that sum to one."""
    with no_autocast(query.device.type):
        logits = attention_logits(query.float(), key.float(), scale, softcap)
    real = query_columns >= 0
    visible = (columns[:, None, :] <= query_columns[:, :, None]) | ~real[:, :, None]
    attention = softmax_beside(logits.masked_fill(~visible[:, None], float("-inf")), sinks)
    weights = (real.float() / real.sum(dim=1, keepdim=True).clamp(min=1))[:, :, None]
    return attention, weights


def no_autocast(device: str) -> AbstractContextManager[None]:
    """Return a context in which products keep their dtypes."""
    # Entered only where it changes something: a graph with an autocast region has no place in
    # AOTAutograd's cache.
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
