"""Tiles and frames of a batch as pictures, each with the grid of its tokens.

image_grid_thw, video_grid_thw     # patches, a frame after another: a picture a frame
pixel_values [tiles, 3, H, W]      # tiles of all images
pixel_values [rows, most, 3, H, W] # tiles row by row, the rest of a row empty
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hidrop_fx.models import Modality, family_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A tile of an image, or a frame of a video."""

    pixels: Tensor
    """[3, H, W], normalised as the vision tower saw it."""
    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    row: int
    columns: Tensor
    """Columns of the prompt, int64 [tokens]."""


def pieces_of(model: Any, inputs: Mapping[str, Any]) -> list[Piece] | None:
    """Return the pieces of all images, then of all videos, in order; None where a class has none that are known."""
    found: list[Piece] = []
    for kind in family_of(model).modalities:
        if inputs.get(kind.pixels) is None:
            continue
        places = inputs["input_ids"] == kind.token(model.config)
        pictures = _pictures(model, kind, inputs, places)
        if pictures is None:
            return None
        lengths = [rows * columns for _, (rows, columns) in pictures]
        if sum(lengths) != int(places.sum()):
            return None
        cut = _cut(places, lengths)
        for (pixels, grid), (row, columns) in zip(pictures, cut, strict=True):
            found.append(Piece(pixels=pixels, grid=grid, row=row, columns=columns))
    return found


_Pictures = list[tuple[Tensor, tuple[int, int]]]


def _pictures(
    model: Any, kind: Modality, inputs: Mapping[str, Any], places: Tensor
) -> _Pictures | None:
    pixels: Tensor = inputs[kind.pixels]
    grids = inputs.get(f"{kind.name}_grid_thw")
    if grids is not None and pixels.dim() == 2:
        return _frames(model.config.vision_config, pixels, grids)
    if kind.count is None or pixels.dim() not in (4, 5):
        return None
    if pixels.dim() == 5:  # rows of tiles, those that are not there all zero
        flat = pixels.flatten(0, 1)
        pixels = flat[flat.flatten(1).any(dim=1)]
    tokens, rest = divmod(int(places.sum()), max(1, len(pixels)))
    side = math.isqrt(tokens)
    if rest or side * side != tokens:
        return None
    return [(tile, (side, side)) for tile in pixels]


def _frames(config: Any, patches: Tensor, grids: Tensor) -> _Pictures | None:
    """Put flat patches [n, 3 * time * P * P], in the order of merged squares, together to frames."""
    side, merge = int(config.patch_size), int(getattr(config, "spatial_merge_size", 2))
    if patches.shape[1] % (3 * side * side):
        return None
    together = patches.shape[1] // (3 * side * side)
    found: _Pictures = []
    start = 0
    for time, height, width in grids.tolist():
        own = patches[start : start + time * height * width]
        start += len(own)
        rows, columns = height // merge, width // merge
        cells = own.view(time, rows, columns, merge, merge, 3, together, side, side)[
            :, ..., 0, :, :
        ]
        frames = cells.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(time, 3, height * side, width * side)
        found += [(frame, (rows, columns)) for frame in frames]
    return found


def _cut(places: Tensor, lengths: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Cut the places of each row into pieces of these lengths."""
    pending = list(lengths)
    for row, place in enumerate(places):
        columns = place.nonzero().flatten()
        while len(columns):
            length = pending.pop(0)
            yield row, columns[:length]
            columns = columns[length:]
