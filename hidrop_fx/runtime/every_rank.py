"""What a call does where other processes gather the same parameters: the same modules in each, and gradients in the same places.

check_gathered(decoder); check_schedule(schedule)
features = features_of_every_rank(scheduled, encoded, prompt, device)    # where images are encoded, before any text
text = depending(text, features)
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import embedding_table
from hidrop_fx.capture.sharded import is_unit, is_whole, not_gathered
from hidrop_fx.errors import InputError
from hidrop_fx.models.blank import encode_blank
from hidrop_fx.models.encoding import Encoded
from hidrop_fx.runtime.prompt import Prompt
from hidrop_fx.runtime.reduction import reduced_blank, watched_tower
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.schedule.schedule import Schedule


def check_gathered(decoder: Any) -> None:
    """Check that a sharded model was called by the module that gathers what no layer does.

    Raises:
        HidropError: it was not, and the first layer that is called would take itself for the whole model.
    """
    table = embedding_table(decoder)
    if not is_unit(decoder.get_input_embeddings()) and not is_whole(table):
        raise not_gathered("the token embedding", table)


def check_schedule(
    schedule: Schedule, engine: str = "fully_shard shards", *, partitioned: bool = False
) -> None:
    """Check that a schedule reads no parameters but those of the layers that it runs.

    Args:
        engine: what is done to the model, for the message.
        partitioned: each call of a module gathers its parameters (ZeRO-3), and all processes must make it.

    Raises:
        InputError: it does.
    """
    if partitioned and schedule.modules:
        raise InputError(
            f"the schedule reads the module {schedule.modules[0]!r}, which a process without images would not call while "
            "ZeRO-3 has the others wait for it. Use another schedule, fully_shard or ZeRO-2"
        )
    if "twig" in schedule.modules:
        raise InputError(
            f"score={schedule.score!r} reads a side branch of layers, whose parameters no call gathers where "
            f"{engine} the model; use another score"
        )


def features_of_every_rank(
    scheduled: ScheduledModel, encoded: Encoded, prompt: Prompt, device: torch.device
) -> list[Tensor]:
    """Return all features [tokens, D] of a call, or those of a blank image, so that every process runs the tower.

    The blank image's go nowhere: `depending` gives them a gradient of zero. It is left out where the tower needs no other
    process: its parameters are the whole model's, and no gradient is wanted.

    Args:
        prompt: of the call.
        device: of the call.
    """
    if not encoded.features:
        decoder = scheduled.decoder
        parts = [m for m in scheduled.base.children() if decoder not in m.modules()]
        reduction = scheduled.schedule.reduction
        if reduction is not None and "text" in reduction.reducer.needs:
            parts.append(scheduled.embedding)
        parameters = (parameter for part in parts for parameter in part.parameters())
        gradient = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if not gradient and not any(is_unit(m) for part in parts for m in part.modules()):
            return []
        like = embedding_table(decoder) if prompt.embeds is None else prompt.embeds
        with watched_tower(scheduled) as tower:
            encoded = encode_blank(scheduled.family, scheduled.model, like.dtype, device)
        more = reduced_blank(scheduled, prompt, encoded, tower)
        encoded = replace(encoded, features=[*encoded.features, *more])
    return [*encoded.features, *(each for layer in encoded.additions for each in layer)]
