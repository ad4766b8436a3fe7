"""What a call does where tensor parallelism divides the decoder: gradients are summed once, and all processes run one schedule.

division = Division.of(model)              # None for a whole one
division.follow(scheduled)                 # before each prompt
"""

from typing import Any, Self

from torch import nn

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.parallel_styles import Noted, is_divided, noted_hooks, release_hooks
from hidrop_fx.capture.sharded import mesh_of
from hidrop_fx.distributed.agreement import check_agreement
from hidrop_fx.errors import InputError
from hidrop_fx.runtime.scheduled_model import ScheduledModel


class Division:
    """A divided model under one schedule: transformers divides a model when it loads it, and for good."""

    def __init__(self, decoder: nn.Module) -> None:
        self._noted: list[Noted] = noted_hooks(decoder)
        self._agreed = False

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """Return how a model is divided, if only its head; None where it is whole."""
        return cls(text_decoder(model)) if is_divided(model) else None

    def follow(self, scheduled: ScheduledModel) -> None:
        """Take away transformers' hooks on gradients; once, check the schedule and compare it with the other processes'.

        Raises:
            InputError: it reads what no process has.
            HidropError: the processes run different schedules.
        """
        for noted in self._noted:
            if noted:
                release_hooks(noted)
        if self._agreed:
            return
        check_divided(scheduled)
        layers = scheduled.plan.num_layers
        check_agreement(mesh_of(scheduled.decoder), f"{scheduled.schedule} on {layers} layers")
        self._agreed = True


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
