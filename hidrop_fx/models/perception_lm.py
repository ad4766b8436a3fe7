"""PerceptionLM: videos go through the encoder of images, under an argument of their own."""

from dataclasses import replace
from typing import Any

from hidrop_fx.models.family import Family, Modality
from hidrop_fx.models.items import pieces, runs


def perception_lm(family: Family) -> Family:
    video = Modality(
        name="video",
        token=lambda config: config.video_token_id,
        inputs=("pixel_values_videos",),
        encode=_encode_videos,
        count=runs,
        units=pieces,
    )
    return replace(family, modalities=(*family.modalities, video))


def _encode_videos(base: Any, given: dict[str, Any]) -> Any:
    return base.get_image_features(pixel_values=given["pixel_values_videos"], return_dict=True)
