"""A model for VLMEvalKit, which asks one question at a time.

from vlmeval.config import supported_VLM
supported_VLM["hidrop-64"] = partial(vlmeval_model, pretrained="llava", schedule="hidrop-64")
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hidrop_fx.errors import InputError
from hidrop_fx.evaluation.answering import answered
from hidrop_fx.evaluation.conversations import (
    Conversation,
    Part,
    image_part,
    text_part,
    turn,
    video_part,
)
from hidrop_fx.evaluation.generation import Generation
from hidrop_fx.evaluation.loading import load_scheduled


class HidropVLM:
    """Answers VLMEvalKit's messages; `vlmeval_model` makes it one of VLMEvalKit's own models."""

    INTERLEAVE = True
    allowed_types = ("text", "image", "video")
    is_api = False

    def __init__(
        self,
        pretrained: str | None = None,
        schedule: str | None = None,
        *,
        backend: str = "inductor",
        dtype: str = "auto",
        device: str | None = None,
        attention: str | None = None,
        attn_implementation: str | None = None,
        num_frames: int | None = None,
        **generation: Any,
    ) -> None:
        """Load the model and compile it.

        Args:
            pretrained, schedule, backend, dtype, device, attention, attn_implementation: see
                `hidrop_fx.evaluation.loading.load_scheduled`.
            num_frames: frames that are read of a video; None for what the processor does.
            generation: arguments of `generate`, such as max_new_tokens=512; greedy where none say otherwise.
        """
        self._loaded = load_scheduled(
            pretrained,
            schedule,
            backend=backend,
            dtype=dtype,
            device=device,
            attention=attention,
            attn_implementation=attn_implementation,
        )
        self._num_frames = num_frames
        self._generation = Generation.of_task(generation)

    def generate_inner(
        self, message: Sequence[Mapping[str, str]], dataset: str | None = None
    ) -> str:
        """Answer a message, texts and files in order: [{"type": "image", "value": path}, {"type": "text", "value": text}].

        Args:
            dataset: its name, which changes nothing.

        Raises:
            InputError: a part has another type, or its file is no image.
        """
        return self._answer([turn("user", *_parts(message))])

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answer a conversation of several turns: [{"role": "user", "content": [{"type": ..., "value": ...}]}, ...]."""
        return self._answer([turn(one["role"], *_parts(one["content"])) for one in message])

    def _answer(self, conversation: Conversation) -> str:
        loaded = self._loaded
        with loaded.in_use():
            done = answered(
                loaded.model,
                loaded.processor,
                [conversation],
                self._generation,
                num_frames=self._num_frames,
            )
        return done.answers[0].text


def vlmeval_model(**arguments: Any) -> Any:
    """Return a `HidropVLM` that is a `BaseModel` of VLMEvalKit, for its table of models.

    Args:
        arguments: those of `HidropVLM`.
    """
    from vlmeval.vlm.base import BaseModel

    class Hidrop(HidropVLM, BaseModel):  # type: ignore[misc, unused-ignore]
        pass

    return Hidrop(**arguments)


def _parts(message: Sequence[Mapping[str, Any]]) -> list[Part]:
    makers = {"text": text_part, "image": image_part, "video": video_part}
    for part in message:
        if part["type"] not in makers:
            raise InputError(
                f"a message has a part of type {part['type']!r}; a model takes {', '.join(makers)}"
            )
    return [makers[part["type"]](part["value"]) for part in message]
