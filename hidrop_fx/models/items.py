"""Count a prompt's images as the user gave them, where a class encodes tiles, frames or rows.

    <img> TTTT TTTT TTTT </img>           runs: an image with its tiles is one run of places
    TILE_1 TTTT TILE_2 TTTT GLOBAL TTTT   spaced runs: one token stands between the tiles of an image
    <r1c1> TT <r1c2> TT <global> TT       closed runs: the last tile of every image has the same name

The encoder's output tells only how many tiles there are; which belong together is in the prompt.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import base_of
from hidrop_fx.errors import InputError, ScheduleError
from hidrop_fx.models.family import CountItems, CountUnits, Family
from hidrop_fx.planning.batch_layout import count_images
from hidrop_fx.schedule.schedule import Schedule

logger = logging.getLogger("hidrop_fx")


def runs(ids: Tensor | None, places: Tensor, *, gap: int = 0) -> list[int]:
    """Count runs of places bool [B, L]; up to `gap` other tokens may stand inside one."""
    counts = []
    for row in places:
        columns = row.nonzero().flatten()
        counts.append(int((columns.diff() > gap + 1).sum()) + min(1, len(columns)))
    return counts


def closed_runs(ids: Tensor | None, places: Tensor) -> list[int]:
    """Count runs whose first place follows the same token as that of the row's last run.

    Raises:
        InputError: the tokens are not known.
    """
    if ids is None:
        if not places.any():
            return [0] * len(places)
        raise InputError(
            "inputs_embeds do not tell which tiles make an image; pass input_ids, or an identity schedule"
        )
    ids = ids.cpu()
    starts = places.clone()
    starts[:, 1:] &= ~places[:, :-1]
    before = torch.roll(ids, 1, dims=1)
    before[:, 0] = -1
    counts = []
    for row, first in zip(before, starts, strict=True):
        names = row[first]
        counts.append(int((names == names[-1]).sum()) if len(names) else 0)
    return counts


_ONE_RUN: CountItems = runs
_SPACED: CountItems = partial(runs, gap=1)


def pieces(places: Tensor, lengths: Sequence[int], position_ids: Tensor) -> list[int]:
    """Count entries of the features, where each is a tile or a frame."""
    return count_images(places, lengths)


def stretches(places: Tensor, lengths: Sequence[int], position_ids: Tensor) -> list[int]:
    """Count runs of places, where a word stands before each tile or frame."""
    return runs(None, places)


def frames_by_position(places: Tensor, lengths: Sequence[int], position_ids: Tensor) -> list[int]:
    """Count the places whose height and width are those of the first place of their run: a frame begins there.

    Raises:
        InputError: the position ids are those of plain text.
    """
    counts = []
    for row, ids in zip(places, position_ids.transpose(0, 1), strict=True):
        columns = row.nonzero().flatten()
        starts = torch.cat([columns.new_ones(len(columns[:1])), columns.diff() > 1]).bool()
        first = columns[starts][starts.cumsum(0) - 1]
        time, sides = ids[0], ids[-2:]
        if bool((columns != first).any()) and bool((sides[:, columns] == time[columns]).all()):
            raise InputError(
                "per='frame' counts frames by position ids of time, height and width, and this call's are those of "
                "text; pass mm_token_type_ids, as the model's processor returns them"
            )
        counts.append(int((sides[:, columns] == sides[:, first]).all(dim=0).sum()))
    return counts


ITEMS: dict[str, CountItems] = {
    "AriaForConditionalGeneration": _ONE_RUN,  # crops
    "AyaVisionForConditionalGeneration": _SPACED,  # a TILE token between tiles
    "Cohere2VisionForConditionalGeneration": _SPACED,  # a line break between tiles
    "GotOcr2ForConditionalGeneration": _ONE_RUN,  # patches, or pages
    "GraniteDoclingForConditionalGeneration": closed_runs,
    "Idefics2ForConditionalGeneration": _ONE_RUN,  # a split image counts five: nothing joins them
    "Idefics3ForConditionalGeneration": closed_runs,
    "InternVLForConditionalGeneration": _ONE_RUN,  # a video's frames are images of their own
    "Llama4ForConditionalGeneration": partial(
        runs, gap=2
    ),  # tile_x_separator; tile_y_separator and image
    "Ovis2ForConditionalGeneration": _SPACED,  # a grid token between tiles
    "PerceptionLMForConditionalGeneration": _ONE_RUN,
    "QianfanOCRForConditionalGeneration": _ONE_RUN,
    "SmolVLMForConditionalGeneration": closed_runs,  # likewise the frames of a video
}
"""How images are counted, by class; in all others each entry of the features is an image."""

_TILES_IN_RUNS = frozenset(
    f"{name}ForConditionalGeneration"
    for name in ("GraniteDocling", "Idefics2", "Idefics3", "SmolVLM")
)
"""Classes whose features come row by row, each tile with words of its own around it."""

_APART = {
    "Idefics2ForConditionalGeneration": "the tiles of a split image are",
    "InternVLForConditionalGeneration": "the frames of a video are",
    "MiniCPMV4_6ForConditionalGeneration": "the slices of an image, and the frames of a video, are",
    "SmolVLMForConditionalGeneration": "the frames of a video are",
}
"""What counts as images of their own, as the prompt has nothing that joins them."""

VIDEO_ITEMS: dict[str, CountItems] = {"VideoLlavaForConditionalGeneration": _ONE_RUN}
"""Likewise videos whose frames are encoded one by one."""


def units_of(model: Any, kind: str, inputs: Sequence[str]) -> CountUnits | None:
    """Return how the tiles of images, or the frames of videos, of a class are counted; None if they cannot be."""
    name = type(model).__name__
    if kind == "video":
        if hasattr(base_of(model), "compute_3d_position_ids"):
            return frames_by_position
        return pieces if name in VIDEO_ITEMS else None
    if "image_sizes" in inputs and hasattr(model.config, "image_grid_pinpoints"):
        return None  # joined to one piece, without what would tell them apart
    return stretches if name in _TILES_IN_RUNS else pieces


def check_units(model: Any, family: Family, schedule: Schedule) -> None:
    """Check that what a schedule's int keeps count can be counted.

    One line of the log tells where an item is less than what the user gave.

    Raises:
        ScheduleError: it cannot; names the class.
    """
    apart = _APART.get(type(model).__name__)
    counts = any(isinstance(keep, int) for keep in schedule.prune.values())
    if apart is not None and counts and schedule.per == "item":
        logger.info(
            "%s: %s images of their own in a prompt, and an integer keep counts each; per='sample' counts the "
            "prompt, a fraction needs no count",
            type(model).__name__,
            apart,
        )
    wanted = {"tile": "image", "frame": "video"}.get(schedule.per)
    kind = None if wanted is None else family.modality(wanted)
    if kind is None or kind.units is not None:
        return
    raise ScheduleError(
        f"per={schedule.per!r}: the encoder of {type(model).__name__} joins the {schedule.per}s of {wanted}s to one piece "
        "in which they cannot be counted; use per='item', or a fraction"
    )
