"""What a call does where other processes gather the same parameters: the same modules in each, and gradients in the same places.

check_gathered(decoder); check_schedule(schedule)
text = depending_on_features(scheduled, encoded, text)
"""

from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import embedding_table
from hidrop_fx.capture.sharded import is_unit, is_whole, not_gathered
from hidrop_fx.distributed.dependence import depending
from hidrop_fx.errors import InputError
from hidrop_fx.models.blank import encode_blank
from hidrop_fx.models.encoding import Encoded
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.schedule.schedule import Schedule


def check_gathered(decoder: Any) -> None:
    """Check that a sharded model was called by the module that gathers what no layer does.

    Raises:
        HidropError: it was not, and the first layer that is called would take itself for the whole model.
    """
    if not is_unit(decoder.get_input_embeddings()) and not is_whole(embedding_table(decoder)):
        raise not_gathered("the token embedding")


def check_schedule(schedule: Schedule, engine: str = "fully_shard shards") -> None:
    """Check that a schedule reads no parameters but those of the layers that it runs.

    Args:
        engine: what is done to the model, for the message.

    Raises:
        InputError: it does.
    """
    if "twig" in schedule.modules:
        raise InputError(
            f"score={schedule.score!r} reads a side branch of layers, whose parameters no call gathers where "
            f"{engine} the model; use another score"
        )


def depending_on_features(scheduled: ScheduledModel, encoded: Encoded, text: Tensor) -> Tensor:
    """Return the text stream's embeddings [B, T, D], with a gradient of zero for every feature of the call."""
    return depending(text, _features(scheduled, encoded, text))


def _features(scheduled: ScheduledModel, encoded: Encoded, text: Tensor) -> list[Tensor]:
    """Return all features [tokens, D] of a call, or those of a blank image, so that every process runs the tower.

    The blank image's go nowhere. It is left out where the tower needs no other process: its parameters are the whole
    model's, and no gradient is wanted.
    """
    if not encoded.features:
        decoder = scheduled.decoder
        parts = [m for m in scheduled.base.children() if decoder not in m.modules()]
        parameters = (parameter for part in parts for parameter in part.parameters())
        gradient = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if not gradient and not any(is_unit(m) for part in parts for m in part.modules()):
            return []
        encoded = encode_blank(scheduled.family, scheduled.model, text.detach())
    return [*encoded.features, *(each for layer in encoded.additions for each in layer)]
