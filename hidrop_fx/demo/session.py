"""Load a vision-language model, ask it about pictures, plainly and under a schedule, and time both.

model, processor = load("llava-hf/llava-1.5-7b-hf", device="cuda", dtype="bfloat16")
inputs = chat(processor, [image], "What is this?")
print(answer(model, processor, inputs, max_new_tokens=64))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from hidrop_fx.api import compile as hidrop_compile
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import Picture, Question, all_questions, picture, questions
from hidrop_fx.errors import HidropError, InputError
from hidrop_fx.inspection.compile_progress import watching
from hidrop_fx.inspection.report.inspection import Inspection
from hidrop_fx.inspection.report.last_call import inspect
from hidrop_fx.inspection.timing import Measurement, measure, warm_up

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What transformers raises when a model cannot be loaded.
_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError)
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
    model, processor = load(str(directory))
    shown = picture(seed, "test")
    asked = some_questions(shown, seed, count)
    path = output / f"picture-{seed}.png"
    output.mkdir(parents=True, exist_ok=True)
    shown.image.save(path)
    prompts = [_inputs(model, processor, [shown.image], one.prompt_text) for one in asked]

    tell("asking the plain Hugging Face model")
    plain = [answer(model, processor, one, _ANSWER_TOKENS) for one in prompts]
    hf = measure(model, prompts[0], new_tokens=_DECODE_TOKENS)

    hidrop_compile(model, schedule, backend=backend)
    prepare(model, prompts[0], tell)
    tell("asking under the schedule")
    with watching(model, tell):
        ours = [answer(model, processor, one, _ANSWER_TOKENS) for one in prompts]
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


def load(
    name: str, *, device: str | None = None, dtype: str = "auto", attention: str | None = None
) -> tuple[Any, Any]:
    """A model and its processor from a directory or the Hub, in eval mode.

    Args:
        device: None takes the GPU if there is one. dtype: one of `DTYPES`.
        attention: `attn_implementation` of transformers.
    """
    where = _device(device)
    if dtype not in DTYPES:
        raise HidropError(f"dtype={dtype!r}; use one of {', '.join(DTYPES)}")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attention
        )
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, error) from error
    return model.to(where).eval(), processor


def load_config(name: str) -> Any:
    """A model's config alone."""
    try:
        return AutoConfig.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise _not_loaded(name, error) from error


def open_image(path: Path) -> Image.Image:
    """An image file in RGB."""
    if not path.is_file():
        raise InputError(f"no image file {path}")
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is not an image that Pillow can read: {error}") from error


def chat(model: Any, processor: Any, images: Sequence[Image.Image], prompt: str) -> dict[str, Any]:
    """Inputs for one question about some images, in the processor's chat format if it has one."""
    token = getattr(processor, "image_token", "<image>")
    if token in prompt:
        raise InputError(f"leave {token} out of the prompt: one is put before it for every image")
    if getattr(processor, "chat_template", None) is None:
        places = f"{token}\n" * len(images)
        text = f"USER: {places}{prompt} ASSISTANT:"
        return _inputs(model, processor, images, text)
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": prompt})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return _on_device(model, inputs)


def answer(model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> str:
    """The greedy answer to one prompt."""
    produced = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    fresh = produced[:, inputs["input_ids"].shape[1] :]
    text: str = processor.batch_decode(fresh, skip_special_tokens=True)[0]
    return text.strip()


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


def _inputs(model: Any, processor: Any, images: Sequence[Image.Image], text: str) -> dict[str, Any]:
    return _on_device(model, processor(images=list(images), text=text, return_tensors="pt"))


def _on_device(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    return {name: moved(value) for name, value in inputs.items()}


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HidropError(f"device={name!r} cannot be used: {reason}") from error
    return device


def _not_loaded(name: str, error: Exception) -> HidropError:
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return HidropError(f"cannot load {name}: no such directory")
    return HidropError(f"cannot load {name}: {' '.join(str(error).split())}")
