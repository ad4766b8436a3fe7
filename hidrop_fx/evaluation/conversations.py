"""Conversations as a batch: roles, texts, images and videos in, what the model is called with out.

inputs = conversation_inputs(model, processor, [[turn("user", image_part(image), text_part("What is this?"))]])
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from hidrop_fx.errors import InputError
from hidrop_fx.models.prompts import on_device, open_image

Part = dict[str, Any]
Turn = dict[str, Any]
Conversation = list[Turn]
"""Turns as transformers' chat templates take them: {"role": ..., "content": [{"type": "text", "text": ...}, ...]}."""

ROLES = ("system", "user", "assistant")


def turn(role: str, *parts: Part) -> Turn:
    """Return a turn of a conversation.

    Raises:
        InputError: no chat template knows such a role.
    """
    if role not in ROLES:
        raise InputError(f"a turn has the role {role!r}; the roles are {', '.join(ROLES)}")
    return {"role": role, "content": list(parts)}


def text_part(text: str) -> Part:
    """Return a text of a turn."""
    return {"type": "text", "text": text}


def image_part(image: Any) -> Part:
    """Return an image of a turn, as RGB: one of Pillow, or the path of a file.

    Raises:
        InputError: the path is that of no image.
    """
    found = image.convert("RGB") if isinstance(image, Image.Image) else open_image(image)
    return {"type": "image", "image": found}


def video_part(video: Any) -> Part:
    """Return a video of a turn: the path of a file, or its frames."""
    return {"type": "video", "video": video}


def conversation_inputs(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    answered: bool = False,
    num_frames: int | None = None,
) -> dict[str, Any]:
    """Make the inputs of a batch of conversations, padded on the left, on the model's device and in its dtype.

    The processor's chat template writes them; without one, LLaVA-1.5's "USER: ... ASSISTANT:".

    Args:
        answered: the last turn is the assistant's; otherwise the model's answer comes next.
        num_frames: frames that are read of a video's file; None for what the processor does.

    Raises:
        InputError: there is a video, and a processor without a chat template.
    """
    side: dict[str, Any] = {"padding": True, "padding_side": "left"}
    if getattr(processor, "chat_template", None) is None:
        images = [image for one in conversations for image in _images(one)]
        texts = [_written(processor, one, answered=answered) for one in conversations]
        inputs = processor(images=images or None, text=texts, return_tensors="pt", **side)
        return on_device(model, inputs)
    files = [video for one in conversations for video in _videos(one) if isinstance(video, str)]
    if num_frames is not None and files:
        side["num_frames"] = num_frames
    inputs = processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=not answered,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=side,
    )
    return on_device(model, inputs)


def _videos(conversation: Conversation) -> list[Any]:
    parts = [part for each in conversation for part in each["content"]]
    return [part["video"] for part in parts if part["type"] == "video"]


def _images(conversation: Conversation) -> list[Any]:
    parts = [part for each in conversation for part in each["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def _written(processor: Any, conversation: Conversation, *, answered: bool) -> str:
    """Write a conversation as LLaVA-1.5 has it."""
    if _videos(conversation):
        raise InputError(
            f"a video for {type(processor).__name__}, which has no chat template: set processor.chat_template"
        )
    token = getattr(processor, "image_token", "<image>")
    written = ""
    for each in conversation:
        images = f"{token}\n" * sum(part["type"] == "image" for part in each["content"])
        text = "\n".join(part["text"] for part in each["content"] if part["type"] == "text")
        match each["role"]:
            case "system":
                written += f"{images}{text} "
            case "user":
                written += f"USER: {images}{text} "
            case _:
                written += f"ASSISTANT: {images}{text}{processor.tokenizer.eos_token or ''}"
    return written if answered else f"{written}ASSISTANT:"
