"""Ovis2: five marker tokens of the text get learned embeddings from the visual table, in calls with an image."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.models.family import Family
from hidrop_fx.models.forward_code import EMBEDDINGS


def ovis2(family: Family) -> Family:
    return replace(
        family,
        text_embeds=_with_markers,
        inputs=family.inputs | {"labels"},
        declares=family.declares | {EMBEDDINGS},
    )


def _with_markers(base: Any, ids: Tensor, embeds: Tensor, outputs: Mapping[str, Any]) -> Tensor:
    if "image" not in outputs:
        return embeds
    rows = outputs["image"].visual_indicator_features.to(embeds.device, embeds.dtype)
    for token, row in zip(base.visual_indicator_token_ids, rows, strict=True):
        embeds = torch.where((ids == token)[:, :, None], row, embeds)
    return embeds
