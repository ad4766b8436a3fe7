"""LLaVA-OneVision: a newline ends each video; before transformers 5.23 its forward puts it there, not its encoder."""

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from hidrop_fx.models.family import Family


def llava_onevision(family: Family) -> Family:
    video = family.modality("video")
    if video is None:
        return family
    encode = video.encode

    def encode_ended(base: Any, given: dict[str, Any]) -> Any:
        output = encode(base, given)
        of: Any = type(base)
        if _forward_ends_videos(of):
            features = output.pooler_output
            newline = base.image_newline.to(features).expand(len(features), 1, -1)
            output.pooler_output = torch.cat([features, newline], dim=1)
        return output

    video = replace(video, encode=encode_ended)
    kinds = tuple(video if kind.name == "video" else kind for kind in family.modalities)
    return replace(family, modalities=kinds)


@cache
def _forward_ends_videos(base: Any) -> bool:
    return "image_newline" in inspect.getsource(inspect.unwrap(base.forward))
