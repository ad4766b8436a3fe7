"""Merging by hand: which token goes where, and what the mean is."""

from __future__ import annotations

import torch
from torch import Tensor

from hidrop_fx.ops.merging import merge_nearest_key
from hidrop_fx.ops.tokens import find_columns

NAN = float("nan")


def merged(
    hidden: Tensor,
    keys: Tensor,
    columns: list[int],
    kept: list[int],
    vision: list[int],
    length: int,
) -> Tensor:
    """One row; keys [S, d]."""
    table = torch.zeros(1, length + 1, dtype=torch.bool)
    table[0, vision] = True
    before, after = torch.tensor([columns]), torch.tensor([kept])
    index = find_columns(before, after)
    return merge_nearest_key(hidden[None], keys[None, None], before, after, index, table)[0]


def test_each_dropped_token_goes_to_the_nearest_and_ties_to_the_first() -> None:
    # Columns 0 and 5 are text; 1 and 3 stay.
    keys = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [5.0, 5.0], [0.0, 1.0]])
    hidden = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]], requires_grad=True)
    found = merged(hidden, keys, [0, 1, 2, 3, 4, 5], [0, 1, 3, 5], [1, 2, 3, 4], 6)
    # 2 is nearest to 3, whatever its length; 4 is as near to 1 as to 3; text takes nothing in.
    assert found.flatten().tolist() == [1.0, (2 + 16) / 2, (8 + 4) / 2, 32.0]
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [1.0, 0.5, 0.5, 0.5, 0.5, 1.0]


def test_pads_and_rows_that_keep_none_take_nothing_in() -> None:
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [NAN, NAN]])
    hidden = torch.tensor([[1.0], [2.0], [4.0], [NAN]])
    # The sentinel, 6, comes last, and again among those that stay.
    found = merged(hidden, keys, [0, 2, 4, 6], [0, 6], [2, 4], 6)
    assert found[0].tolist() == [1.0], "no vision token stays: those that are dropped are lost"
    found = merged(hidden, keys, [0, 2, 4, 6], [0, 2, 6], [2, 4], 6)
    assert found[:2].flatten().tolist() == [1.0, 3.0]


def test_heads_count_together_and_halves_are_summed_in_full() -> None:
    hidden = torch.full((2, 5, 1), 0.1, dtype=torch.bfloat16)
    keys = torch.zeros(2, 2, 5, 2)
    keys[:, 0, :, 0], keys[:, 1, :, 1] = 1.0, torch.tensor([0.0, 3.0, 3.0, 0.0, 0.0])
    columns = torch.arange(5).repeat(2, 1)
    kept = torch.tensor([[0, 1], [0, 1]])
    table = torch.tensor([True, True, True, True, True, False]).expand(2, -1)
    hidden[0, :, 0] = torch.tensor([1.0, 2.0, 4.0, 7.0, 10.0])
    found = merge_nearest_key(hidden, keys, columns, kept, kept, table)
    assert found.dtype == torch.bfloat16
    assert found[0].flatten().tolist() == [(1 + 7 + 10) / 3, 3.0]
    torch.testing.assert_close(found[1], hidden[1, :2], rtol=4e-3, atol=0)


def test_autocast_changes_nothing() -> None:
    """Keys lie closer to each other than bf16 tells apart."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=draw)
    keys = torch.randn(64, 16, generator=draw) + 4 * torch.randn(16, generator=draw)
    everything = list(range(64))
    plain = merged(hidden, keys, everything, everything[::4], everything, 64)
    with torch.autocast("cpu", torch.bfloat16):
        cast = merged(hidden, keys, everything, everything[::4], everything, 64)
    assert torch.equal(cast, plain)
