"""Text that rates vision tokens: which of it is near the image, and the attention that it pays.

    near   = softmax(vision @ text.T, dim=text).mean(dim=vision)             # of the embeddings
    raters = near > near.mean()
    scores = attention[raters].mean(dim=heads and raters)                    # fp32 [B, S]

The second rule corrects attention for what RoPE alone makes of a distance, and lets some heads speak:

    gravity = rope(ones) @ rope(ones).T / sqrt(d)
    scores  = best(attention / gravity, heads)[raters].mean(dim=heads and raters)
"""

import torch
from torch import Tensor

from hidrop_fx.ops.attention_scores import attention_of_rows, no_autocast
from hidrop_fx.ops.tokens import find_columns, take_tokens


def text_raters(
    text: Tensor,
    text_columns: Tensor,
    vision: Tensor,
    vision_columns: Tensor,
    query_columns: Tensor,
    is_vision: Tensor,
) -> Tensor:
    """Compute the share fp32 [B, Q] that each query row has in a score: equal ones of the raters, zero for others.

    A row is a rater if the softmax of its products with a vision token, over the rows, is above average once
    averaged over the vision tokens. Where none is, a single one for example, all are.

    Args:
        text: [B, T, D], vision: [B, V, D], as they enter the first layer.
        text_columns: int64 [B, T]. vision_columns: int64 [B, V], the sentinel L where a row has fewer.
        query_columns: int64 [B, Q], -1 where a row has fewer.
        is_vision: bool [B, L + 1], by column.
    """
    real = query_columns >= 0
    rows = take_tokens(text, find_columns(text_columns, query_columns.clamp(min=0)))
    there = (vision_columns < is_vision.shape[1] - 1)[:, :, None]
    with no_autocast(text.device.type):
        products = vision.detach().float() @ rows.detach().float().transpose(1, 2)
    near = products.masked_fill(~real[:, None], float("-inf")).softmax(dim=-1)
    count = there.sum(dim=1).clamp(min=1)
    near = torch.where(there, near, 0.0).sum(dim=1) / count
    mean = near.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
    above = real & (near > mean)
    raters = torch.where(above.any(dim=1, keepdim=True), above, real)
    return raters.float() / raters.sum(dim=1, keepdim=True)


def rater_scores(
    previous_query: Tensor,
    previous_key: Tensor,
    columns: Tensor,
    query_columns: Tensor,
    raters: Tensor,
    previous_scale: float,
    previous_softcap: float | None = None,
    previous_sinks: Tensor | None = None,
) -> Tensor:
    """Compute the attention that the raters paid each token in the layer before, averaged over heads and raters.

    Args:
        previous_query: [B, H, Q, d], previous_key: [B, G, S, d], rotated.
        columns: int64 [B, S]. query_columns: int64 [B, Q]. raters: fp32 [B, Q].

    Returns:
        fp32 [B, S]
    """
    given = (previous_query, previous_key, columns, query_columns, previous_scale)
    attention, _ = attention_of_rows(*given, previous_softcap, previous_sinks)
    return (attention.mean(dim=1) * raters[:, :, None]).sum(dim=1)


def gravity_scores(
    previous_query: Tensor,
    previous_key: Tensor,
    columns: Tensor,
    is_vision: Tensor,
    query_columns: Tensor,
    raters: Tensor,
    previous_cos: Tensor,
    previous_sin: Tensor,
    previous_scale: float,
    previous_softcap: float | None = None,
    previous_sinks: Tensor | None = None,
    *,
    heads: int = 14,
) -> Tensor:
    """Compute `rater_scores` of attention over its gravity, of the heads that pay most to the image.

    Gravity is the logit of a query and a key that are all ones before RoPE.

    Args:
        is_vision: bool [B, S].
        previous_cos, previous_sin: [B, S, r], each angle twice, as Llama's.
        heads: how many of them.

    Returns:
        fp32 [B, S]

    Raises:
        ValueError: the layer has fewer heads.
    """
    if not 1 <= heads <= previous_query.shape[1]:
        raise ValueError(
            f"heads={heads} of {previous_query.shape[1]} that the layer has; use heads from 1 to {previous_query.shape[1]}"
        )
    given = (previous_query, previous_key, columns, query_columns, previous_scale)
    attention, _ = attention_of_rows(*given, previous_softcap, previous_sinks)
    places = find_columns(columns, query_columns.clamp(min=0))
    with no_autocast(columns.device.type):
        cos, sin = previous_cos.float(), previous_sin.float()
        gravity = take_tokens(cos, places) @ cos.transpose(1, 2)
        gravity = gravity + take_tokens(sin, places) @ sin.transpose(1, 2)
    gravity = (gravity + previous_query.shape[3] - previous_cos.shape[2]) * previous_scale
    rated = attention / gravity[:, None] * raters[:, None, :, None]
    by_head = rated.sum(dim=2)
    to_image = (by_head * is_vision[:, None]).sum(dim=2)
    best = to_image.argsort(dim=1, descending=True, stable=True)[:, :heads]
    return by_head.gather(1, best[:, :, None].expand(-1, -1, columns.shape[1])).mean(dim=1)
