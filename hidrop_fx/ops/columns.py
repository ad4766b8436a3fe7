"""Columns of a padded batch, worked out on the host.

A column is a token's place in its padded row. Rows hold different numbers of them, so chosen ones are packed to the left
and a sentinel fills what is left over.
"""

import torch
from torch import Tensor

# A segment of one token would be compiled apart from all others.
SHORTEST = 2


def pack(
    chosen: Tensor, *, most: int | None = None, shortest: int = SHORTEST, multiple: int = 1
) -> Tensor:
    """Pack the columns of a mask bool [B, L] to the left: int64 [B, n], ascending.

    The sentinel L fills rows that have fewer.

    Args:
        most: number of columns of the fullest row, if it is known.
        shortest: least n.
        multiple: n is rounded up to a multiple of it.
    """
    length = chosen.shape[1]
    if most is None:
        most = int(chosen.sum(dim=1).max())
    most = rounded_up(max(shortest, most), multiple)
    columns = (
        torch.where(chosen, torch.arange(length, device=chosen.device), length).sort(dim=1).values
    )
    if most > length:
        filler = columns.new_full((len(columns), most - length), length)
        columns = torch.cat([columns, filler], dim=1)
    return columns[:, :most].contiguous()


def rounded_up(length: int, multiple: int) -> int:
    """Round a length up to a multiple."""
    return -(-length // multiple) * multiple
