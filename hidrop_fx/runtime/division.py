"""A model that tensor parallelism divides: its gradients are summed once, and schedules read what each process has.

division = Division.of(model)              # None for a whole one
division.release_hooks()                   # before each prompt
check_divided(scheduled)
"""

from typing import Any, Self

from torch import nn

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.parallel_styles import Noted, is_divided, noted_hooks, release_hooks
from hidrop_fx.errors import InputError
from hidrop_fx.runtime.scheduled_model import ScheduledModel


class Division:
    """A divided model: transformers divides a model when it loads it, and for good."""

    def __init__(self, decoder: nn.Module) -> None:
        self._noted: list[Noted] = noted_hooks(decoder)

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """Return how a model is divided, if only its head; None where it is whole."""
        return cls(text_decoder(model)) if is_divided(model) else None

    def release_hooks(self) -> None:
        """Take away transformers' hooks on gradients, which it puts back whenever it trains the model uncompiled."""
        for noted in self._noted:
            if noted:
                release_hooks(noted)


def check_divided(scheduled: ScheduledModel) -> None:
    """Check that a schedule reads nothing that tensor parallelism divides otherwise than the decoder's own layers.

    Raises:
        InputError: it does.
    """
    schedule, decoder = scheduled.schedule, scheduled.decoder
    if "twig" in schedule.modules:
        raise InputError(
            f"score={schedule.score!r} reads a side branch of layers, which are whole where tensor parallelism divides those of the "
            "decoder; use another score"
        )
    if schedule.prune and not schedule.scorer.deterministic and not is_divided(decoder):
        raise InputError(
            f"score={schedule.score!r} is drawn in each process, and this tp_plan divides nothing of the text decoder, in which they "
            "would agree; use another score"
        )
    towers = [part for part in scheduled.base.children() if decoder not in part.modules()]
    if schedule.before is not None and any(map(is_divided, towers)):
        raise InputError(
            f"before={schedule.before} reads a vision tower whose heads tensor parallelism divides; leave the tower out of the "
            "tp_plan"
        )
