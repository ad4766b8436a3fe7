"""Batches of tensors drawn from the pictures."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from hidrop_fx.demo.build import PATCHES
from hidrop_fx.demo.pictures import COLOURS, GRID, VALUES, Picture, Split, picture

_VALUE_INDEX = {value: index for index, value in enumerate(VALUES)}
_COLOUR_INDEX = {"": len(COLOURS), **{name: index for index, name in enumerate(COLOURS)}}
LABEL_SIZES = (len(VALUES), len(COLOURS) + 1, GRID, GRID)


def pixel_values(drawn: Sequence[Picture]) -> torch.Tensor:
    """Normalise the pictures as the image processor does, [B, 3, 96, 96] in -1..1."""
    stacked = np.stack([np.asarray(one.image) for one in drawn])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def spread(cells: torch.Tensor) -> torch.Tensor:
    """Repeat a fact of each cell, [B, 9, ...], for each of its patches, [B, 144, ...]."""
    index = torch.arange(PATCHES) * GRID // PATCHES
    return cells[:, (index[:, None] * GRID + index[None, :]).flatten()]


def patch_labels(drawn: Sequence[Picture]) -> torch.Tensor:
    """Return value, colour, row and column of each patch's cell, [B, 144, 4]."""
    facts = [
        [
            (_VALUE_INDEX[cell.value], _COLOUR_INDEX[cell.colour], cell.row, cell.column)
            for cell in one.cells
        ]
        for one in drawn
    ]
    return spread(torch.tensor(facts))


def draw(seeds: range, split: Split) -> list[Picture]:
    """Draw the pictures of a run of seeds."""
    return [picture(seed, split) for seed in seeds]


def drawn_ahead(first: int, count: int, batch: int, split: Split) -> Iterator[list[Picture]]:
    """Yield ``count`` batches from seed ``first`` on, the next one drawn in the background."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future[list[Picture]] | None = None
        for start in range(first, first + (count + 1) * batch, batch):
            finished = pending
            pending = pool.submit(draw, range(start, start + batch), split)
            if finished is not None:
                yield finished.result()


def cell_patches() -> torch.Tensor:
    """Return the sixteen patches of each cell, [9, 16]."""
    side = PATCHES // GRID
    grid = torch.arange(PATCHES * PATCHES).view(GRID, side, GRID, side)
    return grid.permute(0, 2, 1, 3).reshape(GRID * GRID, side * side)


def middle_patches() -> torch.Tensor:
    """Return the four patches in the middle of each cell, [9, 4]."""
    return cell_patches()[:, [5, 6, 9, 10]]
