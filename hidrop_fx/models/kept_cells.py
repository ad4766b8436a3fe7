"""Encode some of the cells of images with a tower that attends within windows (Qwen2.5-VL): each at its own place.

    output = encode_cells(base, {"pixel_values": ..., "image_grid_thw": ...}, kept)

The tower's own forward runs, on the patches that stay: their rotary positions, windows and images are those they had among
all. Patches of one window attend to each other, those of one image in the layers with full attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from hidrop_fx.capture.layers import base_of
from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.models.family import Family, Modality

_ATTRIBUTES = ("patch_embed", "fullatt_block_indexes", "spatial_merge_size", "window_size")
PIXELS, GRID = "pixel_values", "image_grid_thw"


def check_cells(model: Any, family: Family, reduction: str) -> None:
    """Check that the model's tower takes flat patches with a grid, and can run on some of them.

    Raises:
        UnsupportedModelError: it is another.
    """
    tower, images = getattr(base_of(model), "visual", None), family.modality("image")
    fits = all(hasattr(tower, name) for name in _ATTRIBUTES)
    if images is None or not fits or images.inputs[:2] != (PIXELS, GRID):
        raise UnsupportedModelError(
            f"before={reduction} takes patches out of an image before the vision tower, and that of "
            f"{type(model).__name__} is not like Qwen2.5-VL's, which can run on some of them: a model.visual of "
            f"{PIXELS} and {GRID}, with windows. Use a reducer that reads features, such as divprune"
        )


def cell_shape(base: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the pixels of a cell."""
    config = base.visual.config
    side = config.spatial_merge_size * config.patch_size
    return getattr(config, "in_channels", 3), side, side


def grids(base: Any, grid_thw: Tensor) -> list[tuple[int, int, int]]:
    """Return how many cells each image has in time, height and width."""
    merge = base.visual.spatial_merge_size
    return [(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()]


def blank_images(base: Any, images: int, tokens: int) -> dict[str, Tensor]:
    """Make the arguments of so many images of so many cells each, all zero."""
    config, weight = base.visual.config, next(base.visual.parameters())
    merge, patch = config.spatial_merge_size, config.patch_size
    width = getattr(config, "in_channels", 3) * config.temporal_patch_size * patch * patch
    rows = images * tokens * merge * merge
    return {
        PIXELS: torch.zeros(rows, width, dtype=weight.dtype, device=weight.device),
        GRID: torch.tensor([[1, merge, merge * tokens]] * images, device=weight.device),
    }


def keeping(kind: Modality, kept: Sequence[Tensor]) -> Modality:
    """Return a kind of images of which only some cells are encoded.

    Args:
        kept: bool [cells] of each image, on the host.
    """

    def encode(base: Any, given: Mapping[str, Any]) -> Any:
        return encode_cells(base, given, kept)

    return replace(kind, encode=encode, features=None)


def encode_cells(base: Any, given: Mapping[str, Any], kept: Sequence[Tensor]) -> Any:
    """Run the tower on the cells that stay; `pooler_output` is a list of [cells that stay, D], one for each image."""
    tower, pixels, grid = base.visual, given[PIXELS], given[GRID].cpu()
    stays = torch.cat(list(kept))
    counts = [int(each.sum()) for each in kept]
    if not any(counts):
        return BaseModelOutputWithPooling(pooler_output=torch.empty(0, device=given[PIXELS].device))
    merge, device = tower.spatial_merge_size, pixels.device
    unit = merge * merge
    patches = stays.repeat_interleave(unit)
    index, windows = get_vision_window_index(
        grid,
        spatial_merge_size=merge,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    rank = stays.cumsum(0) - 1
    output = tower(
        pixels[patches.to(device)].type(tower.dtype),
        grid_thw=given[GRID],
        position_ids=get_vision_position_ids(grid, merge)[patches].to(device),
        window_index=rank[index[stays[index]]].to(device),
        cu_window_seqlens=_ends(stays[index], windows, unit).to(device),
        cu_seqlens=_ends(stays, get_vision_cu_seqlens(grid), unit).to(device),
        return_dict=True,
    )
    output.pooler_output = torch.split(output.pooler_output, counts)
    return output


def _ends(stays: Tensor, ends: Tensor, unit: int) -> Tensor:
    """Return where stretches of patches end, int32 [n + 1], given where they ended among all of them; empty ones are gone."""
    before = pad(stays.cumsum(0), (1, 0))[(ends // unit).long()] * unit
    return torch.unique_consecutive(before).to(torch.int32)
