"""What attention hands to PyTorch's kernels on a GPU: fake tensors there, since the choice is made by device and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from hidrop_fx.ops.attention import causal_attention, masked_attention

Shapes = tuple[tuple[int, ...], ...]


class Calls(TorchFunctionMode):
    """Notes query, key and value shapes of every fused attention, and whether it is asked to group heads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Shapes, bool]] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            shapes = tuple(tuple(value.shape) for value in args[:3])
            self.found.append((shapes, kwargs.get("enable_gqa", False)))
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


@contextmanager
def on_a_fake_gpu(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """A query of 8 heads, and keys of 2."""
    with FakeTensorMode():
        query = torch.empty(1, 8, 6, 16, device="cuda", dtype=dtype)
        yield query, torch.empty(1, 2, 6, 16, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_floats_reach_a_kernel_that_takes_no_grouped_heads(dtype: torch.dtype) -> None:
    with on_a_fake_gpu(dtype) as (query, key), Calls() as calls:
        causal_attention(query, key, key, 1.0)
    assert calls.found == [(((1, 8, 6, 16),) * 3, False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_kernels_are_given_the_groups(dtype: torch.dtype) -> None:
    with on_a_fake_gpu(dtype) as (query, key), Calls() as calls:
        causal_attention(query, key, key, 1.0)
    assert calls.found == [(((1, 8, 6, 16), (1, 2, 6, 16), (1, 2, 6, 16)), True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_reaches_a_kernel_that_takes_no_grouped_heads(dtype: torch.dtype) -> None:
    with on_a_fake_gpu(dtype) as (query, key), Calls() as calls:
        mask = torch.ones(1, 1, 6, 6, dtype=torch.bool, device="cuda")
        masked_attention(query, key, key, mask, 1.0)
    assert calls.found == [(((1, 8, 6, 16),) * 3, False)]


def test_repeated_heads_are_those_that_groups_share() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 8, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(
        masked_attention(query, key, value, mask, 0.5), causal_attention(query, key, value, 0.5)
    )
