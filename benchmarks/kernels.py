"""Time the matrix products and attentions of a prefill alone: the least that it can take.

A floor for any compiler that calls the same kernels: a schedule cannot come to its token-layer
limit where this floor alone is already above it, as in small models, whose few rows leave kernels
half idle.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


def layers(model: Any, tokens: Sequence[int], *, batch: int = 1) -> Callable[[], None]:
    """Return a call that runs the linear layers and the attention of every decoder layer, on random rows.

    Args: tokens: that each layer runs on, as in `Plan.tokens`.
    """
    config = model.config.get_text_config()
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    like = {"device": model.device, "dtype": model.dtype}
    work: list[tuple[list[tuple[nn.Linear, torch.Tensor]], tuple[torch.Tensor, ...]]] = []
    for layer, length in zip(model.get_decoder().layers, tokens, strict=True):
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        rows = [torch.randn(batch * length, module.in_features, **like) for module in linear]
        states = [torch.randn(batch, n, length, width, **like) for n in (heads, groups, groups)]
        work.append((list(zip(linear, rows, strict=True)), tuple(states)))

    @torch.no_grad()
    def run() -> None:
        for products, (query, key, value) in work:
            for module, rows in products:
                module(rows)
            scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=heads != groups
            )

    return run
