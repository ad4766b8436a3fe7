"""The kernel that `scaled_dot_product_attention` takes on an H100, in place of a choice that a CPU build cannot make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda

CHOSEN: Counter[str] = Counter()
"""Calls by kernel, dtype, and mask or none."""

_HALF = (torch.float16, torch.bfloat16)
_ALIGNED = 16


def choose_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> str:
    """Return "cudnn", "flash", "efficient" or "math", by the rules that dense inputs can meet on sm_90."""
    half, width = query.dtype in _HALF, int(query.shape[-1])
    same = width == int(value.shape[-1])
    if half and cuda.cudnn_sdp_enabled() and width <= 128 and width % 8 == 0:
        return "cudnn"
    if half and mask is None and same and width <= 256 and cuda.flash_sdp_enabled():
        return "flash"
    grouped = int(query.shape[1]) != int(
        key.shape[1]
    )  # which the kernel of torch 2.11 does not take
    if width % (8 if half else 4) == 0 and not grouped and cuda.mem_efficient_sdp_enabled():
        return "efficient"
    return "math"


def install(on_device: Callable[[Tensor], bool]) -> None:
    """Let attention of tensors that `on_device` is true of become a kernel of CUDA."""
    aten: Any = torch.ops.aten

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        kernel = "math"
        if on_device(query):
            kernel = choose_attention(query, key, value, attn_mask, dropout_p)
            masked = "masked" if attn_mask is not None else "no mask"
            CHOSEN[f"{kernel} {str(query.dtype).removeprefix('torch.')} {masked}"] += 1
        if kernel == "math":
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]  # fmt: skip
        trained = torch.is_grad_enabled() and any(v.requires_grad for v in (query, key, value))
        bias = _bias(attn_mask, query)
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, trained, dropout_p, is_causal, False, scale=scale
            )[0]
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if bias is not None:
            bias = _aligned(bias).expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, trained, dropout_p, is_causal, scale=scale
        )[0]

    aten.scaled_dot_product_attention.default.py_impl(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )(attention)


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, float("-inf")).to(like.dtype)


def _aligned(bias: Tensor) -> Tensor:
    """Pad rows of a mask as sdp_utils.cpp does, whose question is a guard."""
    if all(stride % _ALIGNED == 0 for stride in bias.stride()[:-1]):
        return bias
    width = bias.shape[-1]
    padded = torch.nn.functional.pad(bias, (0, _ALIGNED - width % _ALIGNED))
    return padded[..., :width]
