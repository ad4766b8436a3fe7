"""The demo: ask the shipped model about a picture, plainly and under a schedule, and time both."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hidrop_fx.api import compile as hidrop_compile
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import Picture, Question, all_questions, picture, questions
from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.compile_progress import watching
from hidrop_fx.inspection.report.inspection import Inspection
from hidrop_fx.inspection.report.last_call import inspect
from hidrop_fx.inspection.timing import Measurement, measure, warm_up
from hidrop_fx.models.loading import load_model
from hidrop_fx.models.prompts import greedy_answer, prompt_inputs

_ANSWER_TOKENS = 8
_DECODE_TOKENS = 32

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question, the right answer, and what was answered."""

    question: str
    expected: str
    hf: str
    """By the plain Hugging Face model."""
    hidrop: str
    """By the same model under the schedule."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What `demo` found out."""

    picture: Picture
    path: Path
    """The picture as a PNG file."""
    parameters: int
    asked: tuple[Asked, ...]
    hf: Measurement
    hidrop: Measurement
    inspection: Inspection

    def to_dict(self) -> dict[str, Any]:
        """Everything as what JSON can hold."""
        report = self.inspection
        return {
            "picture": str(self.path),
            "cells": [cell.text for cell in self.picture.cells],
            "parameters": self.parameters,
            "schedule": report.schedule.to_dict(),
            "backend": report.backend,
            "questions": [asdict(one) for one in self.asked],
            "correct": {
                name: sum(getattr(one, name) == one.expected for one in self.asked)
                for name in ("hf", "hidrop")
            },
            "tokens": [layer.tokens for layer in report.layers],
            "identity_tokens": list(report.plan.identity.tokens),
            "hf": self.hf.to_dict(),
            "hidrop": self.hidrop.to_dict(),
            "compile_seconds": report.compile_seconds,
            "fallbacks": list(report.fallbacks),
        }


def demo(
    schedule: str,
    *,
    output: Path,
    count: int = 6,
    seed: int = 0,
    backend: str = "inductor",
    directory: Path = MODEL_DIR,
    tell: Tell = lambda _: None,
) -> Session:
    """Ask the small model about one picture that it has never seen, plainly and under a schedule.

    Args:
        output: folder for the picture. count: questions at most. seed: of the picture.
        directory: a model made by `hidrop_fx.demo.train`.
    """
    if not directory.is_dir():
        raise HidropError(
            f"the demo's model is not there: {directory} is no directory; reinstall hidrop-fx, or "
            "make the model with python -m hidrop_fx.demo.train --output DIR and pass DIR/model"
        )
    tell("loading the model")
    model, processor = load_model(str(directory))
    shown = picture(seed, "test")
    asked = some_questions(shown, seed, count)
    path = output / f"picture-{seed}.png"
    output.mkdir(parents=True, exist_ok=True)
    shown.image.save(path)
    prompts = [prompt_inputs(model, processor, [shown.image], one.prompt_text) for one in asked]

    tell("asking the plain Hugging Face model")
    plain = [greedy_answer(model, processor, one, _ANSWER_TOKENS) for one in prompts]
    hf = measure(model, prompts[0], new_tokens=_DECODE_TOKENS)

    hidrop_compile(model, schedule, backend=backend)
    prepare(model, prompts[0], tell)
    tell("asking under the schedule")
    with watching(model, tell):
        ours = [greedy_answer(model, processor, one, _ANSWER_TOKENS) for one in prompts]
        hidrop = measure(model, prompts[0], new_tokens=_DECODE_TOKENS)
    return Session(
        picture=shown,
        path=path,
        parameters=sum(p.numel() for p in model.parameters()),
        asked=tuple(
            Asked(question=sentence(one), expected=one.answer, hf=theirs, hidrop=mine)
            for one, theirs, mine in zip(asked, plain, ours, strict=True)
        ),
        hf=hf,
        hidrop=hidrop,
        inspection=inspect(model),
    )


def prepare(model: Any, inputs: Mapping[str, Any], tell: Tell, *, decode: bool = True) -> None:
    """Capture and compile what an answer to these inputs needs, telling of every compilation."""
    tell("capturing the decoder, compiling what the prompt needs")
    with watching(model, tell):
        warm_up(model, inputs, 3 if decode else None)


def some_questions(shown: Picture, seed: int, count: int) -> list[Question]:
    """One question of every kind first, then others, `count` at most."""
    first = questions(shown, seed)
    return [*first, *(q for q in all_questions(shown) if q not in first)][:count]


def sentence(question: Question) -> str:
    """The question itself, without what the prompt puts around it."""
    return question.prompt_text.split("\n", 1)[1].removesuffix(" ASSISTANT:")
