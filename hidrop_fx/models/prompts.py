"""Make a model's inputs from images and a question, and decode its answer.

inputs = chat_inputs(model, processor, [open_image("cat.png")], "What is this?")
print(greedy_answer(model, processor, inputs, max_new_tokens=64))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from hidrop_fx.errors import InputError


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        InputError: no such file, or no format that Pillow reads.
    """
    if not Path(path).is_file():
        raise InputError(f"no image file {path}")
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is not an image that Pillow can read: {error}") from error


def chat_inputs(
    model: Any, processor: Any, images: Sequence[Image.Image], question: str
) -> dict[str, Any]:
    """Make the inputs of one question about some images, batch 1, on the model's device and dtype.

    The processor's chat template formats the prompt; without one, LLaVA-1.5's "USER: ... ASSISTANT:".

    Raises:
        InputError: the question holds a placeholder; one is put before it for every image.
    """
    token = getattr(processor, "image_token", "<image>")
    if token in question:
        raise InputError(f"leave {token} out of the prompt: one is put before it for every image")
    if getattr(processor, "chat_template", None) is None:
        places = f"{token}\n" * len(images)
        return prompt_inputs(model, processor, images, f"USER: {places}{question} ASSISTANT:")
    inputs = processor.apply_chat_template(
        _conversation(images, question),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return on_device(model, inputs)


def chat_batch(
    model: Any, processor: Any, asked: Sequence[tuple[Sequence[Image.Image], str]]
) -> dict[str, Any]:
    """Make the inputs of several questions, each about its own images, as `chat_inputs` does; padded on the left.

    Raises:
        InputError: a question holds a placeholder; one is put before it for every image.
    """
    if len(asked) == 1:
        return chat_inputs(model, processor, *asked[0])
    token = getattr(processor, "image_token", "<image>")
    for _, question in asked:
        if token in question:
            raise InputError(
                f"leave {token} out of the prompt: one is put before it for every image"
            )
    side = {"padding": True, "padding_side": "left"}
    if getattr(processor, "chat_template", None) is None:
        places = [f"{token}\n" * len(shown) for shown, _ in asked]
        texts = [
            f"USER: {place}{question} ASSISTANT:"
            for place, (_, question) in zip(places, asked, strict=True)
        ]
        images = [image for shown, _ in asked for image in shown]
        inputs = processor(images=images or None, text=texts, return_tensors="pt", **side)
        return on_device(model, inputs)
    inputs = processor.apply_chat_template(
        [_conversation(shown, question) for shown, question in asked],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=side,
    )
    return on_device(model, inputs)


def prompt_inputs(
    model: Any, processor: Any, images: Sequence[Image.Image], text: str | Sequence[str]
) -> dict[str, Any]:
    """Make the inputs of complete prompts, placeholders included; several are padded to one length."""
    batch: dict[str, Any] = {} if isinstance(text, str) else {"padding": True}
    text = text if isinstance(text, str) else list(text)
    inputs = processor(images=list(images), text=text, return_tensors="pt", **batch)
    return on_device(model, inputs)


def greedy_answer(
    model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int
) -> str:
    """Generate the greedy answer to one prompt."""
    return greedy_answers(model, processor, inputs, max_new_tokens)[0]


def greedy_answers(
    model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int
) -> list[str]:
    """Generate the greedy answer to each prompt of a batch, without special tokens."""
    produced = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    fresh = produced[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = processor.batch_decode(fresh, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _conversation(images: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": question})
    return [{"role": "user", "content": content}]


def on_device(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Move inputs to the model's device, and those in floating point to its dtype."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    return {name: moved(value) for name, value in inputs.items()}
