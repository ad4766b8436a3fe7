"""Count a prompt's images as the user gave them, where a class encodes tiles, frames or rows.

    <img> TTTT TTTT TTTT </img>           runs: an image with its tiles is one run of places
    TILE_1 TTTT TILE_2 TTTT GLOBAL TTTT   spaced runs: one token stands between the tiles of an image
    <r1c1> TT <r1c2> TT <global> TT       closed runs: the last tile of every image has the same name

The encoder's output tells only how many tiles there are; which belong together is in the prompt.
"""

from functools import partial

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.models.family import CountItems


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

ITEMS: dict[str, CountItems] = {
    "AriaForConditionalGeneration": _ONE_RUN,  # crops
    "AyaVisionForConditionalGeneration": _SPACED,  # a TILE token between tiles
    "Cohere2VisionForConditionalGeneration": _SPACED,  # a line break between tiles
    "GotOcr2ForConditionalGeneration": _ONE_RUN,  # patches, or pages
    "Idefics2ForConditionalGeneration": _ONE_RUN,  # a split image counts five: nothing joins them
    "Idefics3ForConditionalGeneration": closed_runs,
    "InternVLForConditionalGeneration": _ONE_RUN,  # a video's frames are images of their own
    "Ovis2ForConditionalGeneration": _SPACED,  # a grid token between tiles
    "PerceptionLMForConditionalGeneration": _ONE_RUN,
    "QianfanOCRForConditionalGeneration": _ONE_RUN,
    "SmolVLMForConditionalGeneration": closed_runs,  # likewise the frames of a video
}
"""How images are counted, by class; in all others each entry of the features is an image."""

VIDEO_ITEMS: dict[str, CountItems] = {"VideoLlavaForConditionalGeneration": _ONE_RUN}
"""Likewise videos whose frames are encoded one by one."""
