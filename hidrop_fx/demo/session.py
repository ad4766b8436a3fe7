"""The demo: ask the shipped model about drawn pictures, plainly and under a schedule, and time both.

    one picture:  its questions and answers, the time to the first token of one prompt, its KV cache
    a batch:      32 questions about several pictures in one call of generate, timed whole

The same model object answers twice: first as transformers runs it, uncompiled, then compiled under the
schedule.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hidrop_fx.api import compile as hidrop_compile
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import Picture, Question, held_out, picture, varied_questions
from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.compile_progress import compile_ahead, watching
from hidrop_fx.inspection.report.last_call import inspect
from hidrop_fx.inspection.report.snapshot import Inspection
from hidrop_fx.inspection.timing import Measurement, measure
from hidrop_fx.models.loading import load_model
from hidrop_fx.models.prompts import greedy_answers, prompt_inputs

BATCH = 32
"""Questions of the batch."""
_ANSWER_TOKENS = 8
_REPEATS = 3

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """One question, the right answer, and both models' answers."""

    question: str
    expected: str
    hf: str
    """From the plain Hugging Face model."""
    hidrop: str
    """From the same model under the schedule."""


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """One call of `generate` on a whole batch of questions, warm."""

    correct: int
    seconds: float
    """Median over several calls, tokenisation and image processing left out."""
    questions_per_second: float


@dataclass(frozen=True, kw_only=True)
class BatchComparison:
    """The batch of questions, answered by both models."""

    questions: int
    pictures: int
    hf: BatchTiming
    hidrop: BatchTiming


@dataclass(frozen=True, kw_only=True)
class Session:
    """The answers and measurements of one demo."""

    picture: Picture
    path: Path
    """The picture as a PNG file."""
    parameters: int
    answered: tuple[AnsweredQuestion, ...]
    hf: Measurement
    """One prompt, the first question."""
    hidrop: Measurement
    batch: BatchComparison
    inspection: Inspection
    """Of the last single prompt; it lists all compilations."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        report = self.inspection
        return {
            "picture": str(self.path),
            "cells": [cell.text for cell in self.picture.cells],
            "parameters": self.parameters,
            "schedule": report.schedule.to_dict(),
            "backend": report.backend,
            "questions": [asdict(one) for one in self.answered],
            "correct": {
                name: sum(getattr(one, name) == one.expected for one in self.answered)
                for name in ("hf", "hidrop")
            },
            "tokens": [layer.tokens for layer in report.layers],
            "identity_tokens": list(report.plan.identity.tokens),
            "hf": self.hf.to_dict(),
            "hidrop": self.hidrop.to_dict(),
            "batch": asdict(self.batch),
            "compile_seconds": report.compile_seconds,
            "fallbacks": list(report.fallbacks),
        }


def run_demo(
    schedule: str,
    *,
    output: Path,
    count: int = 6,
    batch: int = BATCH,
    seed: int = 0,
    backend: str = "inductor",
    directory: Path = MODEL_DIR,
    progress: Progress = lambda _: None,
) -> Session:
    """Ask the small model about held-out pictures, plainly and under a schedule.

    Args:
        schedule: a text that `Schedule.parse` reads.
        output: folder for the picture, made if it is not there.
        count: questions about the one picture, at most.
        batch: questions of the batch, one of every kind a picture.
        seed: seed of the picture; the batch's pictures have the seeds after it.
        backend: as for `compile`.
        directory: a model made by `hidrop_fx.demo.train`.
        progress: called with a line at each step.

    Raises:
        HidropError: the model is not there.
    """
    if not directory.is_dir():
        raise HidropError(
            f"the demo's model is not there: {directory} is no directory; reinstall hidrop-fx, or "
            "make the model with python -m hidrop_fx.demo.train --output DIR and pass DIR/model"
        )
    progress("loading the model")
    model, processor = load_model(directory)
    shown = picture(seed, "test")
    asked = varied_questions(shown, seed, count)
    path = output / f"picture-{seed}.png"
    output.mkdir(parents=True, exist_ok=True)
    shown.image.save(path)

    prompt = prompt_inputs(model, processor, [shown.image], asked[0].prompt_text)
    about_one = _inputs(model, processor, [(shown, one) for one in asked])
    pairs = list(islice(held_out(first=seed + 1), batch))
    about_many = _inputs(model, processor, pairs)
    expected = [question.answer for _, question in pairs]

    progress("asking the plain Hugging Face model")
    plain = greedy_answers(model, processor, about_one, _ANSWER_TOKENS)
    hf = measure(model, prompt, new_tokens=None)
    progress(f"asking it {batch} questions at once")
    hf_batch = _time_batch(model, processor, about_many, expected)

    hidrop_compile(model, schedule, backend=backend)
    compile_ahead(model, prompt, progress, decode=False)
    with watching(model, progress):
        progress(f"asking {batch} questions at once under the schedule")
        hidrop_batch = _time_batch(model, processor, about_many, expected)
        progress("asking about one picture under the schedule")
        ours = greedy_answers(model, processor, about_one, _ANSWER_TOKENS)
        hidrop = measure(model, prompt, new_tokens=None)
    return Session(
        picture=shown,
        path=path,
        parameters=sum(p.numel() for p in model.parameters()),
        answered=tuple(
            AnsweredQuestion(question=one.sentence, expected=one.answer, hf=theirs, hidrop=mine)
            for one, theirs, mine in zip(asked, plain, ours, strict=True)
        ),
        hf=hf,
        hidrop=hidrop,
        batch=BatchComparison(
            questions=batch,
            pictures=len({id(drawn) for drawn, _ in pairs}),
            hf=hf_batch,
            hidrop=hidrop_batch,
        ),
        inspection=inspect(model),
    )


def _inputs(
    model: Any, processor: Any, pairs: Sequence[tuple[Picture, Question]]
) -> dict[str, Any]:
    images = [drawn.image for drawn, _ in pairs]
    return prompt_inputs(model, processor, images, [one.prompt_text for _, one in pairs])


def _time_batch(
    model: Any, processor: Any, inputs: Mapping[str, Any], expected: Sequence[str]
) -> BatchTiming:
    """Answer a batch once to warm up, then take the median time of `_REPEATS` calls."""
    answers = greedy_answers(model, processor, inputs, _ANSWER_TOKENS)
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        greedy_answers(model, processor, inputs, _ANSWER_TOKENS)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return BatchTiming(
        correct=sum(map(str.__eq__, answers, expected)),
        seconds=median,
        questions_per_second=len(expected) / median,
    )
