"""Tokens through which text sees the images before them: where they are in a prompt, and which model may have them."""

import logging
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import embedding_table, text_decoder
from hidrop_fx.capture.zero3 import whole_shape
from hidrop_fx.errors import InputError, ScheduleError
from hidrop_fx.models import Family
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.schedule.schedule import Schedule


def bottleneck_of(
    scheduled: ScheduledModel,
    ids: Tensor | None,
    valid: Tensor,
    placeholder: Tensor,
    draft: int,
) -> Tensor | None:
    """Find the first and last column of a schedule's bottleneck in each row: int64 [B, 2], 0 and -1 where there is none.

    Args:
        ids: int64 [B, L]. valid, placeholder: bool [B, L]. All on the host.
        draft: columns at the end that an assistant proposed; they are words.

    Raises:
        InputError: there are no ids to tell it by.
    """
    token = scheduled.schedule.bottleneck
    if token is None:
        return None
    if ids is None:
        raise InputError(
            f"bottleneck={token} is an id, and inputs_embeds do not tell which tokens have it; pass input_ids"
        )
    found = valid & (ids == token)
    found[:, found.shape[1] - draft :] = False
    columns = torch.arange(found.shape[1], device="cpu")
    last = torch.where(found, columns, -1).amax(dim=1)
    first = torch.where(found, columns, found.shape[1]).amin(dim=1)
    wide = (last < 0) & (valid & placeholder).any(dim=1)
    if bool(wide.any()):
        scheduled.log_once(
            f"rows with an image and no token {token}, the bottleneck: all of their text sees the image, and caches hold "
            "it. Put those tokens behind the image",
            logging.WARNING,
        )
    return torch.stack([torch.where(last < 0, 0, first), last], dim=1)


def check_bottleneck(model: Any, family: Family, schedule: Schedule) -> None:
    """Check that the tokens of a bottleneck are words of the model.

    Raises:
        ScheduleError: it has no such word, or it is the place of an image.
    """
    token = schedule.bottleneck
    if token is None:
        return
    words = whole_shape(embedding_table(text_decoder(model)))[0]
    if token >= words:
        raise ScheduleError(
            f"bottleneck={token}, but the model has {words} words, 0 to {words - 1}: add the token to the tokenizer and "
            "call model.resize_token_embeddings, or give the id of another"
        )
    if token in family.tokens(model.config):
        raise ScheduleError(
            f"bottleneck={token} is the placeholder of an image, which the text behind it is to see through other "
            "tokens: give the id of a word"
        )
