"""Causal attention without work for padding: rows end to end, by kernels for sequences of unequal length.

    [B, H, S, d] --valid tokens first--> [B * S, H, d] --kernel--> --back in place--> [B, H, S, d]

Kernels take the tokens of all rows in one sequence, and where each row starts. Invalid tokens are
put behind the last row, where no kernel looks; their output is zero.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from hidrop_fx.errors import UnsupportedModelError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
"""(query [N, H, d], key and value [N, G, d], starts [B + 1], longest row, scale) -> [N, H, d]"""

ATTENTIONS: tuple[str, ...] = ("sdpa", "cudnn", "varlen", "flash_attn")
PACKED: tuple[str, ...] = ("varlen", "flash_attn")
"""Those that work on rows end to end; the others are kernels of `scaled_dot_product_attention`."""


def tells_groups(kernel: Callable[..., object]) -> bool:
    """Return True if a kernel asks whether heads are grouped; that of torch 2.11 takes them without."""
    return "enable_gqa" in inspect.signature(kernel).parameters


_TELLS_GROUPS = tells_groups(varlen.varlen_attn)


def packed_order(columns: Tensor, table: Tensor) -> Tensor:
    """Order a segment's tokens in [B * S], valid ones first, row after row.

    Args: columns: [B, S]; the sentinel L for invalid tokens. table: [B, L + 1], for L alone.
    """
    return torch.argsort((columns == table.shape[1] - 1).flatten(), stable=True)


def row_starts(columns: Tensor, table: Tensor) -> Tensor:
    """Compute where each row starts among the valid tokens, and their number: int32 [B + 1]."""
    lengths = (columns < table.shape[1] - 1).sum(dim=1)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    starts: Tensor,
    scale: float,
    kernel: str,
) -> Tensor:
    """Compute causal attention [B, H, S, d] of each row's valid tokens.

    Args: kernel: "varlen" (PyTorch's own) or "flash_attn" (the package).
    """
    batch, heads, tokens, width = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1)[order] for x in (query, key, value))
    attended = KERNELS[kernel](query, key, value, starts, tokens, scale)
    behind = torch.arange(len(order), device=order.device) >= starts[-1]
    attended = attended.masked_fill(behind[:, None, None], 0)
    placed = torch.zeros_like(attended).index_copy(0, order, attended)
    return placed.view(batch, tokens, heads, width).transpose(1, 2)


def check_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UnsupportedModelError` if a kernel cannot serve a model."""
    if attention == "sdpa":
        return
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half:
        raise UnsupportedModelError(
            f"attention={attention!r} has kernels for CUDA and 16-bit floats; this model is on "
            f"{device} in {dtype}. Move it there, or use attention='sdpa'"
        )
    if attention == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise UnsupportedModelError(
            "attention='flash_attn' needs the flash-attn package: pip install flash-attn, or use "
            "attention='varlen', PyTorch's own kernel"
        )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
) -> Tensor:
    grouped: dict[str, Any] = {}
    if _TELLS_GROUPS:
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    attended = varlen.varlen_attn(
        query, key, value, starts, starts, longest, longest,
        scale=scale, window_size=(-1, 0), **grouped,
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended


def _flash(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    attended: Tensor = flash_attn_varlen_func(
        query, key, value, starts, starts, longest, longest, softmax_scale=scale, causal=True
    )
    return attended


KERNELS: dict[str, Kernel] = {"varlen": _varlen, "flash_attn": _flash}
