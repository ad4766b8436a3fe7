"""Kimi K2.5 and Muse: tokens of images, videos and sounds are embedded as token 0 before features come in their places.

    llm_input_ids[multimodal_mask] = 0

It tells where no features come: of such a token that the model itself has written.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from hidrop_fx.models.family import Family
from hidrop_fx.models.forward_code import WORDS

_TOKENS = ("image_token_id", "video_token_id", "audio_token_id")


def zeroed_words(family: Family) -> Family:
    return replace(family, words=_zeroed, declares=family.declares | {WORDS})


def _zeroed(config: Any, ids: Tensor) -> Tensor:
    for name in _TOKENS:
        token = getattr(config, name, None)
        if token is not None:
            ids = ids.masked_fill(ids == token, 0)
    return ids
