"""Heat maps of a schedule: each filter layer's scores over the image, the survivors outlined.

    for number, picture in enumerate(hidrop_fx.heatmap(model, inputs, processor)):
        picture.save(f"image-{number}.png")

The picture is what the vision tower saw, after the processor's resizing and cropping. Scores are those
of a plain run of the schedule (`hidrop_fx.reference.loop`), survivors those of the program.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hidrop_fx.capture.parallel_styles import check_undivided
from hidrop_fx.errors import HidropError, InputError
from hidrop_fx.inspection.batch import Batch, prepare_batch
from hidrop_fx.inspection.heatmaps.pieces import pieces_of
from hidrop_fx.inspection.heatmaps.scores import ImageScores
from hidrop_fx.inspection.instrumented import Instrumented, ProgramStates
from hidrop_fx.planning.geometry import varying_patches
from hidrop_fx.reference.loop import Events, run_loop
from hidrop_fx.reference.rows import RowStates
from hidrop_fx.runtime.hf.binding import require_runtime

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def heatmap(
    model: Any, inputs: Mapping[str, Any], processor: Any, *, size: int = 336
) -> list["Image"]:
    """Draw, for every image of a batch, the scores and survivors of each filter layer.

    Args:
        model: compiled, under a schedule that prunes.
        inputs: what `model(...)` takes, with `pixel_values`.
        processor: the model's, for the colours that its image processor normalised away.
        size: pixels of a panel's longer side.

    Returns:
        RGB images, in the order of `pixel_values`; a picture a tile where an image has several, and one a frame of
        each video behind them.

    Raises:
        HidropError: the model is not compiled, its schedule never prunes, there is no image, or an
            image is not one grid of patches with a token each.
    """
    from hidrop_fx.inspection.heatmaps.drawing import drawn, shown_pixels

    bound = require_runtime(model, "call hidrop_fx.compile(model, schedule) first")
    check_undivided(bound.model, "hidrop.heatmap")
    if not bound.schedule.prune:
        raise HidropError(
            f"the schedule {bound.schedule} never prunes, so there are no scores to draw; use one with "
            "prune entries"
        )
    reduction = bound.schedule.reduction
    if reduction is not None and reduction.reducer.moves:
        raise HidropError(
            f"before={reduction} merges tokens, which lie at other places than what they show, so that a heat map would point "
            "at the wrong ones; draw one under a schedule that chooses tokens, such as before='divprune(ratio=0.098)'"
        )
    pixels, videos = inputs.get("pixel_values"), inputs.get("pixel_values_videos")
    if pixels is None and videos is None:
        raise InputError("there is no image in these inputs: pass pixel_values")
    if inputs.get("input_ids") is None:
        raise InputError("heat maps need input_ids, to know where each image stands; pass them")
    pieces = pieces_of(model, inputs)
    if pieces is None and videos is not None:
        raise InputError(
            f"heat maps do not know which tokens are a frame in the videos of {type(model).__name__}; draw its images "
            "in a call of their own"
        )
    grids = _grids(model, inputs) if pieces is None else [piece.grid for piece in pieces]
    given = {k: v for k, v in inputs.items() if k not in ("labels", "past_key_values")}
    batch = prepare_batch(model, bound.schedule, given)
    rows = run_loop(model, batch, Events.of(batch.layout.plan))
    options = replace(bound.options, cuda_graphs=False, overlap_vision=False)
    states = Instrumented(model, bound, options).states(given)
    if pieces is not None:
        return [
            drawn(
                shown_pixels(piece.pixels[None], processor)[0],
                _scores(piece.columns, rows, states, piece.row),
                size,
                piece.grid,
            )
            for piece in pieces
        ]
    scores = image_scores(
        batch, rows, states, inputs, model, [down * across for down, across in grids]
    )
    assert pixels is not None
    pictures = shown_pixels(pixels, processor)
    patch = int(model.config.vision_config.patch_size)
    found = []
    for picture, layers, (down, across) in zip(pictures, scores, grids, strict=True):
        whole = picture.crop(
            (0, 0, across * patch, down * patch)
        )  # without what pads it to the largest
        found.append(drawn(whole, layers, size, (down, across)))
    return found


def _grids(model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return rows and columns of each image's tokens."""
    pixels: Tensor = inputs["pixel_values"]
    if pixels.dim() != 4:
        raise InputError(
            f"pixel_values has shape {tuple(pixels.shape)}; heat maps know images of one grid, "
            "[images, 3, height, width], and not crops"
        )
    patch = int(model.config.vision_config.patch_size)
    sizes = [pixels.shape[2:]] * len(pixels)
    if varying_patches(model) is not None and inputs.get("image_sizes") is not None:
        sizes = inputs["image_sizes"]
    grids = [(int(height) // patch, int(width) // patch) for height, width in sizes]
    total = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if total != sum(rows * columns for rows, columns in grids):
        rows, columns = grids[0]
        raise InputError(
            f"{len(pixels)} images have {total} tokens in the prompt, and not the {rows} x {columns} = "
            f"{rows * columns} each of their patches of {patch} pixels; heat maps know images of which "
            "every patch is one token"
        )
    return grids


def image_scores(
    batch: Batch,
    rows: list[RowStates],
    states: ProgramStates,
    inputs: Mapping[str, Any],
    model: Any,
    lengths: Sequence[int],
) -> list[list[ImageScores]]:
    """Collect, image by image, the scores and survivors of each filter layer.

    Args:
        lengths: tokens of each image.
    """
    placeholder = inputs["input_ids"] == model.config.image_token_id
    found = []
    pending = list(lengths)
    for row, images in enumerate(batch.layout.images):
        of_row, pending = pending[:images], pending[images:]
        for columns in placeholder[row].nonzero().flatten().split(of_row) if images else ():
            found.append(_scores(columns, rows, states, row))
    return found


def _scores(
    columns: Tensor, rows: list[RowStates], states: ProgramStates, row: int
) -> list[ImageScores]:
    return [_at(columns, layer, rows[row], states, row) for layer in rows[row].scores]


def _at(
    columns: Tensor, layer: int, states: RowStates, program: ProgramStates, row: int
) -> ImageScores:
    scored, values = states.scores[layer]
    scores = torch.full((len(columns),), math.nan, dtype=torch.float32, device="cpu")
    scores[torch.isin(columns, scored).cpu()] = values[torch.isin(scored, columns)].float().cpu()
    kept = torch.isin(columns, program.columns[layer][row])
    return ImageScores(layer=layer, scores=scores, kept=kept.cpu())
