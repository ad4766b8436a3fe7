"""lmms-eval's messages, and its texts with visuals, as conversations."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from hidrop_fx.errors import InputError
from hidrop_fx.evaluation.conversations import (
    Conversation,
    Part,
    image_part,
    text_part,
    turn,
    video_part,
)

_PLACEHOLDER = "<image>"
"""What texts of lmms-eval's tasks hold where an image belongs, whatever a model's own token is."""
_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def conversation_of(messages: Sequence[dict[str, Any]]) -> Conversation:
    """Read the messages of a task: {"role": "user", "content": [{"type": "image", "url": image}, ...]}.

    Raises:
        InputError: a part is neither text nor image nor video, or a span of a video.
    """
    found = []
    for message in messages:
        content = message["content"]
        parts = (
            [text_part(content)] if isinstance(content, str) else [_part(one) for one in content]
        )
        found.append(turn(message["role"], *parts))
    return found


def shown_and_asked(visuals: Sequence[Any] | None, text: str) -> Conversation:
    """Return one turn of a user: visuals at the placeholders of the text, or in front of it where it has none.

    Raises:
        InputError: there are placeholders, and another number of visuals.
    """
    parts = [_visual(one) for one in visuals or ()]
    pieces = text.split(_PLACEHOLDER)
    if len(pieces) == 1:
        return [turn("user", *parts, text_part(text))]
    if len(pieces) - 1 != len(parts):
        raise InputError(
            f"a task's text has {len(pieces) - 1} places {_PLACEHOLDER} for {len(parts)} visuals: {text[:80]!r}"
        )
    content: list[Part] = []
    for i, piece in enumerate(pieces):
        content += [text_part(piece)] if piece.strip() else []
        content += parts[i : i + 1]
    return [turn("user", *content)]


def _part(content: dict[str, Any]) -> Part:
    match content.get("type"):
        case "text":
            return text_part(content["text"])
        case "image":
            return image_part(content["url"])
        case "video":
            span = [name for name in ("start_time", "end_time") if content.get(name) is not None]
            if span or isinstance(content["url"], dict):
                raise InputError(
                    "a task shows a span of a video (start_time, end_time), which is not cut here: cut the file"
                )
            return video_part(content["url"])
        case kind:
            raise InputError(
                f"a task has a part of type {kind!r}; a model takes text, image and video"
            )


def _visual(visual: Any) -> Part:
    if isinstance(visual, Image.Image):
        return image_part(visual)
    if isinstance(visual, str):
        return image_part(visual) if visual.lower().endswith(_IMAGE_FILES) else video_part(visual)
    if isinstance(visual, (list, tuple)):
        return video_part(list(visual))
    raise InputError(
        f"a task shows a {type(visual).__name__}; a model takes images of Pillow, paths of images and videos, frames"
    )
