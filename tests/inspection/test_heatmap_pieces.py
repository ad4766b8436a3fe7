"""Heat maps of tiles and of the frames of videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.inspection.heatmaps.pieces import pieces_of
from tests.support.families import CASES, IMAGE, VIDEO, make_batch
from tests.support.runtimes import compiled_eagerly


class Processor:
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("name", "rows", "grids"),
    [
        ("internvl", [[5, IMAGE, 6], [8, IMAGE, 9, IMAGE, 7]], [(2, 2)] * (2 + 3 + 2)),
        ("idefics3", [[5, IMAGE, 6], [8, IMAGE, 9, IMAGE, 7], [5, 6]], None),
        ("qwen2_5_vl", [[5, IMAGE, 6], [8, VIDEO, 9, IMAGE, 7]], [(2, 2), (2, 3), (2, 2), (2, 2)]),
        ("qwen3_vl", [[5, VIDEO, 6], [8, IMAGE, 7]], [(2, 2)] * 3),
    ],
)
@torch.no_grad()
def test_a_picture_a_tile_or_frame(name: str, rows: Any, grids: Any) -> None:
    case = CASES[name]
    model = case.make()
    batch = make_batch(case, model, rows)
    pieces = pieces_of(model, batch.inputs)
    assert pieces is not None
    if grids is not None:
        assert [piece.grid for piece in pieces] == grids
    seen = sum(len(piece.columns) for piece in pieces)
    assert seen == sum(len(row.features) for row in batch.rows)
    with compiled_eagerly(model, "prune=1:2"):
        pictures = hidrop.heatmap(model, batch.inputs, Processor, size=48)
    assert len(pictures) == len(pieces)
    shown = np.asarray(pictures[0])[46 : 46 + 48, 14 : 14 + 48].astype(float)
    wanted = (pieces[0].pixels * 0.25 + 0.5).clamp(0, 1) * 255
    assert np.allclose(shown.mean(axis=(0, 1)), wanted.mean(dim=(1, 2)), atol=4)


def test_patches_are_put_together_as_the_processor_took_them_apart() -> None:
    """Against the image processor of Qwen2-VL."""
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_normalize=False, do_rescale=False,
        do_resize=False, do_convert_rgb=False,
    )  # fmt: skip
    image = torch.arange(3 * 16 * 24).reshape(3, 16, 24).float()
    made = processor(images=image.numpy(), return_tensors="pt", input_data_format="channels_first")
    model = CASES["qwen2_vl"].make()
    ids = torch.full((1, 6), 110)
    given = {
        "input_ids": ids,
        "pixel_values": made["pixel_values"],
        "image_grid_thw": made["image_grid_thw"],
    }
    (piece,) = pieces_of(model, given) or []
    assert piece.grid == (2, 3)
    torch.testing.assert_close(piece.pixels.float(), image)
