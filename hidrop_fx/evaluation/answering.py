"""Answer a batch of conversations with `generate`, and tell what it cost.

batch = answered(model, processor, conversations, Generation.of_task({"max_new_tokens": 16}))
batch.answers[0].text, batch.seconds, batch.first_token_seconds
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from hidrop_fx.evaluation.conversations import Conversation, conversation_inputs
from hidrop_fx.evaluation.generation import Generation
from hidrop_fx.evaluation.vision_tokens import executed_vision_tokens

_WARM_UP_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered to one conversation."""

    text: str
    prompt_tokens: int
    """Of the prompt, those of images and videos included, padding not."""
    new_tokens: int
    """Those of the answer, the one that ends it included."""
    vision_tokens: float
    """That a layer ran on, on average over the layers."""


@dataclass(frozen=True, kw_only=True)
class AnsweredBatch:
    """The answers to a batch, and the time of `generate`."""

    answers: list[Answer]
    seconds: float
    first_token_seconds: float
    """From the call until each row had its first token: vision tower and prefill."""
    steps: int
    """Tokens of the longest answer."""


def answered(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    generation: Generation,
    *,
    num_frames: int | None = None,
    warm_up: bool = False,
) -> AnsweredBatch:
    """Answer a batch of conversations, padded on the left; an error of the model or the processor is raised.

    Args:
        num_frames: frames that are read of a video; None for what the processor does.
        warm_up: generate a token or two before, not timed, so that what has to be compiled is.
    """
    inputs = conversation_inputs(model, processor, conversations, num_frames=num_frames)
    if warm_up:
        model.generate(**inputs, do_sample=False, max_new_tokens=_WARM_UP_TOKENS)
    watch = _FirstToken(model.device)
    watch.start()
    tokens = model.generate(**inputs, **generation.arguments, stopping_criteria=[watch])
    seconds = watch.since()
    fresh = tokens[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(fresh, skip_special_tokens=True)
    lengths = _lengths(fresh, model.generation_config.eos_token_id)
    vision = executed_vision_tokens(model, inputs)
    prompts = inputs["attention_mask"].sum(dim=1).tolist()
    answers = [
        Answer(text=generation.cut(text), prompt_tokens=prompt, new_tokens=new, vision_tokens=count)
        for text, prompt, new, count in zip(texts, prompts, lengths, vision, strict=True)
    ]
    first = watch.seconds
    return AnsweredBatch(
        answers=answers,
        seconds=seconds,
        first_token_seconds=seconds if first is None else first,
        steps=fresh.shape[1],
    )


class _FirstToken(StoppingCriteria):
    """Notes when the first token is there, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: float | None = None

    def start(self) -> None:
        self._synchronize()
        self.started = time.perf_counter()

    def since(self) -> float:
        self._synchronize()
        return time.perf_counter() - self.started

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self.seconds is None:
            self.seconds = self.since()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _lengths(tokens: Tensor, eos: int | Sequence[int] | None) -> list[int]:
    """Return the tokens of each row up to the one that ends it, from int64 [B, N]."""
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    if eos is not None:
        ends = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    before = ends.int().cumsum(dim=1) - ends.int()
    lengths: list[int] = (before == 0).sum(dim=1).tolist()
    return lengths
