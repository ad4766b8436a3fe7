"""Checks that a decoder has what a scorer reads of it, before anything is captured."""

from typing import Any

import torch

from hidrop_fx.capture.layers import rotation, text_decoder
from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.methods.registry import SCORERS
from hidrop_fx.methods.sparsevlm import GRAVITY
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.surroundings import neutral_surroundings

_SOME_PLACE = 7


def check_scorer(model: Any, schedule: Schedule) -> None:
    """Check that there are as many heads as a score asks for, and tables of RoPE that it can read.

    Raises:
        ScheduleError: the layers have fewer heads.
        UnsupportedModelError: the tables of cos and sin hold each angle once.
    """
    scorer = schedule.scorer
    if not schedule.prune or scorer.score is not SCORERS[GRAVITY].score:
        return
    decoder = text_decoder(model)
    wanted, there = scorer.keywords["heads"], decoder.config.num_attention_heads
    if not 1 <= wanted <= there:
        raise ScheduleError(
            f"score={schedule.score!r} takes the best {wanted} heads, and a layer of {type(model).__name__} has {there}: use "
            f"heads from 1 to {there}"
        )
    for layer in schedule.prune:
        if not _bears_each_angle_twice(decoder, layer - 1):
            raise UnsupportedModelError(
                f"score={schedule.score!r} divides by what RoPE makes of a distance, and the tables of layer {layer - 1} of "
                f"{type(decoder).__name__} do not hold each angle twice, as Llama's do; use a score without it, such as "
                "raters"
            )


@torch.no_grad()
def _bears_each_angle_twice(decoder: Any, layer: int) -> bool:
    with neutral_surroundings():
        table = next((b for b in decoder.rotary_emb.buffers()), torch.empty(0))
        states = torch.zeros(1, 1, 1, device=table.device)
        ids = torch.full((1, 1), _SOME_PLACE, device=table.device)
        tables = rotation(decoder, states, ids, layer)
    if tables is None:
        return False
    sines = tables[1].flatten()
    first, second = sines.chunk(2)
    return torch.equal(first, second) or torch.equal(sines[::2], sines[1::2])
