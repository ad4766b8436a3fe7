"""Training that is cheap, for a model that is to run with all its tokens, or with few as well as it can.

dual = hidrop.DualTraining(share=0.9, distill="full_from_fast")
Trainer(model=model, callbacks=[dual, hidrop.TrainerCallback()], ...)

for number, batch in enumerate(batches):        # a loop of one's own
    with dual.step(model, number):
        model(**batch).loss.backward()
    optimizer.step()
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Literal

import transformers

from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.runtime.hf.binding import require_schedules
from hidrop_fx.runtime.schedule_set import ScheduleSet
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.dual import DualStep, Kind, Parts, draw

Distill = Literal["full_from_fast", "fast_from_full"]


class DualTraining(transformers.TrainerCallback):
    """Trains most optimizer steps under a reduced schedule, and the others under another, e.g. with all tokens.

        hidrop.compile(model, {"fast": "hidrop-64", "full": hidrop.Schedule()})
        Trainer(model=model, callbacks=[hidrop.DualTraining(), hidrop.TrainerCallback()], ...)

    In a step with a teacher the loss is the model's own and, added by its forward, `weight * temperature**2` times
    KL(teacher || student) of softmax(logits / temperature), averaged over the tokens of the answers as the loss is. The
    teacher is the other schedule, which sees the same batch under `torch.no_grad()`; images are encoded once for
    both. This is the way DualSpeed trains, apart from its learned prompts, which are not implemented.

    Which schedule a step takes depends on `seed` and the step's number alone. In a step, calls in train mode and with
    gradients run under it; evaluation, and calls that ask for a schedule, do not.

    Args:
        fast: the schedule of most steps, by name or text.
        full: the schedule of the others.
        share: of the steps, in 0 .. 1, that are fast, on average.
        distill: "full_from_fast" adds the term to the full steps, "fast_from_full" to the fast ones; None to none.
        weight: of the term.
        temperature: of both distributions in it.
        seed: of the draw.

    Raises:
        HidropError: an argument has no such value.
    """

    def __init__(
        self,
        fast: Schedule | str = "fast",
        full: Schedule | str = "full",
        *,
        share: float = 0.9,
        distill: Distill | None = "full_from_fast",
        weight: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not (_is_number(share) and 0 <= share <= 1):
            raise HidropError(
                f"share={share!r} is no share of the steps; pass a number from 0 to 1"
            )
        if distill not in ("full_from_fast", "fast_from_full", None):
            raise HidropError(
                f'distill={distill!r} is none of "full_from_fast", "fast_from_full" and None'
            )
        if not (_is_number(temperature) and 0 < temperature < math.inf):
            raise HidropError(f"temperature={temperature!r} divides the logits; pass a number > 0")
        if not (_is_number(weight) and 0 <= weight < math.inf):
            raise HidropError(
                f"weight={weight!r} is no weight; pass a number >= 0, or distill=None"
            )
        self.fast, self.full = fast, full
        self.share, self.distill = share, distill
        self.weight, self.temperature, self.seed = weight, temperature, seed
        self._parts = Parts()

    def kind(self, number: int) -> Kind:
        """Return what the optimizer step of a number, counted from 0, is: "fast" or "full".

        Raises:
            HidropError: it is no such number.
        """
        if not _is_number(number, Integral) or number < 0:
            raise HidropError(
                f"number={number!r} is no number of an optimizer step, by which its kind is drawn; count them from 0"
            )
        return "fast" if draw(self.seed, int(number)) < self.share else "full"

    @contextmanager
    def step(self, model: Any, number: int) -> Iterator[Kind]:
        """Let the calls of a block be those of one optimizer step, all its micro-batches; yield its kind.

        Args:
            model: a compiled model, or a wrapper around one.
            number: of the step, from 0.

        Raises:
            HidropError: the model is not compiled, or the number is none.
            ScheduleError: it has no such schedules.
        """
        schedules = _schedules(model)
        before = schedules.step
        made = schedules.step = self._step(schedules, number)
        try:
            yield made.kind
        finally:
            schedules.step = before

    def parts(self) -> dict[str, float]:
        """Return the parts of the loss since the last call, on this process, each as a mean over tokens of answers.

        "loss_fast" and "loss_full" are the model's own loss in steps of that kind, "kl_fast" or "kl_full" the divergence
        without weight and temperature's factor. Those that did not occur are left out.
        """
        return self._parts.take()

    def _step(self, schedules: ScheduleSet, number: int) -> DualStep:
        self._check(schedules)
        kind = self.kind(number)
        own, other = (self.fast, self.full) if kind == "fast" else (self.full, self.fast)
        return DualStep(
            kind=kind,
            schedule=own,
            teacher=other if self.distill is not None and self.distill.startswith(kind) else None,
            needs_labels=self.distill is not None,
            weight=self.weight,
            temperature=self.temperature,
            parts=self._parts,
        )

    def _check(self, schedules: ScheduleSet) -> None:
        if schedules.find(self.fast) is schedules.find(self.full):
            raise ScheduleError(
                f"fast={str(self.fast)!r} and full={str(self.full)!r} are one schedule of this model; compile it with "
                'two, such as hidrop.compile(model, {"fast": "hidrop-64", "full": hidrop.Schedule()})'
            )

    # What Trainer calls.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(_schedules(kwargs["model"]))
        self.parts()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedules = _schedules(kwargs["model"])
        schedules.step = self._step(schedules, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _schedules(kwargs["model"]).step = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _schedules(kwargs["model"]).step = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the parts of the loss to a line of training, and to `state.log_history`."""
        if logs is None or "loss" not in logs:
            return
        parts = self.parts()
        logs.update(parts)
        if state.log_history:
            state.log_history[-1].update(parts)


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind)


def _schedules(model: Any) -> ScheduleSet:
    return require_schedules(
        model,
        'DualTraining needs two schedules: hidrop.compile(model, {"fast": "hidrop-64", "full": hidrop.Schedule()})',
    )
