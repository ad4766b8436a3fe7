"""A call in a step of `DualTraining`: a second pass of the same batch, without gradients, teaches the first.

    features = encode(images)                        # once, where neither schedule chooses by them
    with no_grad(): teacher = logits under one schedule
    student = logits under the other
    loss = model's own loss(student) + sum(lesson(student, teacher)[answers]) / answer tokens

Text tokens are never dropped, so that the rows that predict an answer are the same ones under both schedules, in the same
order. The teacher runs in the model's own mode: with dropout it has its own.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hidrop_fx.capture.layers import base_of
from hidrop_fx.capture.sharded import is_sharded
from hidrop_fx.errors import HidropError, InputError
from hidrop_fx.models import family_of
from hidrop_fx.models.encoding import encode
from hidrop_fx.planning.batch_layout import IGNORE
from hidrop_fx.runtime.hf.head import logits_of
from hidrop_fx.runtime.hf.moving import with_tensors_of_base
from hidrop_fx.runtime.hf.override import record_of
from hidrop_fx.runtime.hf.prediction import Prediction, Request, loss_of, predict
from hidrop_fx.runtime.output import DecoderOutput
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.runtime.schedule_set import ScheduleSet
from hidrop_fx.training.dual import DualStep
from hidrop_fx.training.loss import predicting_rows

_ENCODED = "mm_encoder_outputs"
_LESSONS: ContextVar[list[Tensor] | None] = ContextVar("terms of the loss to come", default=None)


def step_in_force(model: Any, runtime: Runtime, labels: Tensor | None) -> DualStep | None:
    """Return the step that a call belongs to; None outside, in eval mode, without gradients, or where a schedule is asked for.

    Raises:
        InputError: it is to be taught, and has no labels.
    """
    record = record_of(model)
    if record is None or record.schedules.step is None:
        return None
    schedules, step = record.schedules, record.schedules.step
    if runtime is not schedules.default or schedules.asked_for or not torch.is_grad_enabled():
        return None
    if not model.training:
        if labels is not None:
            runtime.log_once(
                "a call with labels and gradients in a step of DualTraining is in eval mode: it runs under the default "
                "schedule, without a lesson; model.train() makes it one of the step",
                logging.WARNING,
            )
        return None
    if labels is None and step.needs_labels:
        raise InputError(
            "a call of a step of DualTraining has no labels, and a schedule is taught on the tokens of the answers; "
            "pass labels, put calls that train nothing under torch.no_grad(), or train with distill=None"
        )
    return step


def dual_prediction(
    model: Any, step: DualStep, request: Request
) -> tuple[Prediction, Tensor | None]:
    """Return what a call computes under the step's schedule, and its loss, the lesson included."""
    schedules = _schedules(model)
    request = replace(request, inputs=_encoded_once(model, step, request.inputs))
    teacher = None
    if step.teacher is not None:
        with torch.no_grad(), schedules.used(step.teacher):
            teacher = _answers(predict(model, schedules.current, request), request)
    with schedules.used(step.schedule):
        found = predict(model, schedules.current, request, fused=teacher is None)
        loss = loss_of(model, schedules.current, request, found)
    if loss is None:
        return found, None
    answers = predicting_rows(found.targets, request.loss_inputs).sum()
    items = _items(request, answers).to(loss.device)
    step.parts.note(f"loss_{step.kind}", loss * items, answers)
    if teacher is not None:
        loss = loss + step.lesson(_answers(found, request), teacher).sum().to(loss.device) / items
    return found, loss


def _answers(found: Prediction, request: Request) -> Tensor:
    """Return the logits that predict a supervised token [n, V], row by row."""
    assert found.logits is not None  # a lesson compares them
    return found.logits[predicting_rows(found.targets, request.loss_inputs).to(found.logits.device)]


def _items(request: Request, answers: Tensor) -> Tensor:
    """Return the tokens that a sum over this call's is divided by."""
    items = request.loss_inputs.get("num_items_in_batch")
    return answers.clamp(min=1) if items is None else torch.as_tensor(items)


def _encoded_once(model: Any, step: DualStep, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with what the encoders make of their pixels, for both passes.

    As they are where there is one pass, where a schedule reduces tokens by what the tower computes beside its features, and
    where other processes gather the same parameters: each pass runs the tower then, with or without images.
    """
    schedules, family = _schedules(model), family_of(model)
    if step.teacher is None or inputs.get(_ENCODED) or is_sharded(model):
        return inputs
    both = (schedules.find(step.schedule), schedules.find(step.teacher))
    if any(runtime.schedule.reduction is not None for runtime in both):
        return inputs
    encoded = with_tensors_of_base(model, lambda: encode(family, base_of(model), inputs))
    if not encoded.outputs:
        return inputs
    pixels = {kind.pixels for kind in family.modalities}
    left = {name: value for name, value in inputs.items() if name not in pixels}
    return left | {_ENCODED: encoded.outputs}


def _schedules(model: Any) -> ScheduleSet:
    record = record_of(model)
    assert record is not None
    return record.schedules


# Where another library's forward computes the loss, from the states of the model without its head.


def dual_states(
    model: Any, step: DualStep, inputs: dict[str, Any], labels: Tensor | None
) -> DecoderOutput:
    """Return hidden states of the full length under the step's schedule; the lesson is kept for `taught`.

    Raises:
        HidropError: nobody waits for the lesson.
    """
    schedules, waiting = _schedules(model), _LESSONS.get()
    inputs = _encoded_once(model, step, inputs)
    if step.teacher is None or labels is None:
        with schedules.used(step.schedule):
            return schedules.current.call(inputs, labels=labels)
    if waiting is None:
        raise _no_place("model.forward, which was called past the model")
    answers = pad(labels[:, 1:] != IGNORE, (0, 1))
    with torch.no_grad(), schedules.used(step.teacher):
        teacher = logits_of(model, _rows(schedules.current.call(inputs, labels=labels), answers))
    with schedules.used(step.schedule):
        states = schedules.current.call(inputs, labels=labels)
    each = step.lesson(logits_of(model, _rows(states, answers)), teacher)
    answers = answers.to(each.device)
    waiting.append(each.new_zeros(answers.shape).masked_scatter(answers, each))
    return states


def _rows(states: DecoderOutput, chosen: Tensor) -> Tensor:
    """Return the hidden states [n, D] at columns bool [B, L]."""
    return states.hidden[chosen.to(states.hidden.device)]


@contextmanager
def waiting_for_lessons() -> Iterator[list[Tensor]]:
    """Collect the terms [B, L] of the calls within a block."""
    found: list[Tensor] = []
    token = _LESSONS.set(found)
    try:
        yield found
    finally:
        _LESSONS.reset(token)


def taught(output: Any, lessons: list[Tensor]) -> Any:
    """Return the output of another library's forward, whose log-probabilities carry the gradient of the lesson.

    Their values stay: TRL's trainers sum them up, each divided as its loss is.

    Raises:
        HidropError: it has none.
    """
    if not lessons:
        return output
    found, each = getattr(output, "log_probs", None), lessons[0]
    widths = (each.shape[1] - 1, each.shape[1])
    if len(lessons) > 1 or found is None or found.dim() != 2 or found.shape[1] not in widths:
        raise _no_place(type(output).__name__)
    each = each[:, : found.shape[1]]
    output.log_probs = found - (each - each.detach())
    return output


def _no_place(where: str) -> HidropError:
    return HidropError(
        f"the loss is computed by another library behind {where}, where DualTraining can add nothing; use a trainer "
        "that takes the model's own loss, or distill=None"
    )
