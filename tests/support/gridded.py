"""Batches of images and videos of many sizes, for classes that take flat patches with a grid (time, height, width)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tests.support.families.batches import Batch, Row, make_batch
from tests.support.families.case import Case

Grid = tuple[int, int, int]
"""Patches in time, height and width."""


def gridded_batch(
    case: Case,
    model: Any,
    rows: Sequence[Row],
    *,
    images: Sequence[Grid],
    videos: Sequence[Grid] = (),
    padding: Literal["left", "right"] = "left",
) -> Batch:
    """A batch whose images have these sizes, in turn, and random pixels."""

    def of(grids: Sequence[Grid], seed: int, pixels: str, grid: str) -> Any:
        def made(model: Any, counts: Any) -> dict[str, Tensor]:
            sizes = torch.tensor([grids[k % len(grids)] for k in range(sum(counts))])
            generator = torch.Generator().manual_seed(seed)
            patches = torch.randn(int(sizes.prod(1).sum()), 96, generator=generator)
            return {pixels: patches, grid: sizes}

        return made

    of_images = of(images, 5, "pixel_values", "image_grid_thw")
    of_videos = of(videos, 6, "pixel_values_videos", "video_grid_thw")
    return make_batch(replace(case, images=of_images, videos=of_videos), model, rows, padding)


def generated(model: Any, made: Batch, **options: Any) -> list[list[int]]:
    """Four greedy tokens behind each row, or what options say."""
    inputs = {k: v.clone() for k, v in made.inputs.items()}
    given = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **options}
    found = model.generate(**inputs, **given)
    return [row[inputs["input_ids"].shape[1] :].tolist() for row in found]
