"""Heat maps of a schedule: each filter layer's scores over the image, the survivors outlined.

    for number, picture in enumerate(hidrop_fx.heatmap(model, inputs, processor)):
        picture.save(f"image-{number}.png")

The picture is what the vision tower saw, after the processor's resizing and cropping. Scores are those
of a plain run of the schedule (`hidrop_fx.reference.loop`), survivors those of the program.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hidrop_fx.errors import HidropError, InputError
from hidrop_fx.inspection.batch import Batch, prepare_batch
from hidrop_fx.inspection.heatmaps.scores import ImageScores
from hidrop_fx.inspection.instrumented import Instrumented, ProgramStates
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
        RGB images, in the order of `pixel_values`.

    Raises:
        HidropError: the model is not compiled, its schedule never prunes, there is no image, or an
            image is not one grid of patches with a token each.
    """
    from hidrop_fx.inspection.heatmaps.drawing import drawn, shown_pixels

    bound = require_runtime(model, "call hidrop_fx.compile(model, schedule) first")
    if not bound.schedule.prune:
        raise HidropError(
            f"the schedule {bound.schedule} never prunes, so there are no scores to draw; use one with "
            "prune entries"
        )
    pixels = inputs.get("pixel_values")
    if pixels is None:
        raise InputError("there is no image in these inputs: pass pixel_values")
    if inputs.get("input_ids") is None:
        raise InputError("heat maps need input_ids, to know where each image stands; pass them")
    grid = _grid(model, pixels, inputs["input_ids"])
    given = {k: v for k, v in inputs.items() if k not in ("labels", "past_key_values")}
    batch = prepare_batch(model, bound.schedule, given)
    rows = run_loop(model, batch, Events.of(batch.layout.plan))
    options = replace(bound.options, cuda_graphs=False, overlap_vision=False)
    states = Instrumented(model, bound, options).states(given)
    scores = image_scores(batch, rows, states, inputs, model)
    pictures = shown_pixels(pixels, processor)
    return [drawn(p, layers, size, grid) for p, layers in zip(pictures, scores, strict=True)]


def _grid(model: Any, pixels: Tensor, ids: Tensor) -> tuple[int, int]:
    """Return rows and columns of every image's tokens."""
    if pixels.dim() != 4:
        raise InputError(
            f"pixel_values has shape {tuple(pixels.shape)}; heat maps know images of one grid, "
            "[images, 3, height, width], and not crops"
        )
    patch = int(model.config.vision_config.patch_size)
    rows, columns = (int(side) // patch for side in pixels.shape[2:])
    total = int((ids == model.config.image_token_id).sum())
    if total != len(pixels) * rows * columns:
        raise InputError(
            f"{len(pixels)} images have {total} tokens in the prompt, and not the {rows} x {columns} = "
            f"{rows * columns} each of their patches of {patch} pixels; heat maps know images of which "
            "every patch is one token"
        )
    return rows, columns


def image_scores(
    batch: Batch,
    rows: list[RowStates],
    states: ProgramStates,
    inputs: Mapping[str, Any],
    model: Any,
) -> list[list[ImageScores]]:
    """Collect, image by image, the scores and survivors of each filter layer."""
    placeholder = inputs["input_ids"] == model.config.image_token_id
    found = []
    for row, images in enumerate(batch.layout.images):
        places = placeholder[row].nonzero().flatten()
        for columns in places.chunk(images) if images else ():
            found.append(
                [_at(columns, layer, rows[row], states, row) for layer in rows[row].scores]
            )
    return found


def _at(
    columns: Tensor, layer: int, states: RowStates, program: ProgramStates, row: int
) -> ImageScores:
    scored, values = states.scores[layer]
    scores = torch.full((len(columns),), math.nan)
    scores[torch.isin(columns, scored)] = values[torch.isin(scored, columns)].float().cpu()
    kept = torch.isin(columns, program.columns[layer][row])
    return ImageScores(layer=layer, scores=scores, kept=kept.cpu())
