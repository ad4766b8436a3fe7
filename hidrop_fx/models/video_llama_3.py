"""VideoLLaMA 3: a mask over all video features drops those of frames that repeat the one before."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hidrop_fx.models.family import Family

_MASK = "video_compression_mask"


def video_llama_3(family: Family) -> Family:
    kinds = tuple(
        replace(kind, features=_kept) if kind.name == "video" else kind
        for kind in family.modalities
    )
    return replace(family, modalities=kinds, inputs=family.inputs | {_MASK})


def _kept(base: Any, output: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    videos = list(output.pooler_output)
    mask = inputs.get(_MASK)
    if mask is None:
        return videos
    parts = mask.split([len(video) for video in videos])
    return [video[part.to(video.device)] for video, part in zip(videos, parts, strict=True)]
