"""How likely a model finds given answers.

losses = answer_losses(model, processor, [(conversation, "a cat"), (conversation, "a dog")])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.errors import InputError
from hidrop_fx.evaluation.conversations import (
    Conversation,
    conversation_inputs,
    text_part,
    turn,
)

_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class AnswerLoss:
    """What a model makes of one answer."""

    loss: float
    """Negative log probability of a token of the answer, on average, with the token that ends it."""
    greedy: bool
    """Greedy generation would give this answer."""


def answer_losses(
    model: Any,
    processor: Any,
    given: Sequence[tuple[Conversation, str]],
    *,
    num_frames: int | None = None,
) -> list[AnswerLoss]:
    """Compute the loss of each answer behind its conversation, in one call of the model.

    Vision tokens are scored as at the prompt: by its last token, not by those of the answer.

    Raises:
        InputError: an answer adds no token to its prompt.
    """
    prompted = [conversation for conversation, _ in given]
    whole = [[*asked, turn("assistant", text_part(text))] for asked, text in given]
    inputs = conversation_inputs(model, processor, whole, answered=True, num_frames=num_frames)
    prompts = conversation_inputs(model, processor, prompted, num_frames=num_frames)
    labels = _labels(inputs, prompts)
    for (_, text), row in zip(given, labels, strict=True):
        if bool((row == _IGNORE).all()):
            raise InputError(f"the answer {text!r} adds no token to its prompt")
    with torch.no_grad():
        logits = model(**inputs, labels=labels).logits
    return [_loss(*row) for row in zip(logits, labels, strict=True)]


def _labels(inputs: dict[str, Any], prompts: dict[str, Any]) -> Tensor:
    """Return the tokens behind those that a row shares with its prompt, int64 [B, L]; -100 before them."""
    labels = inputs["input_ids"].clone()
    rows = zip(inputs["attention_mask"], prompts["attention_mask"], strict=True)
    for i, (valid, of_prompt) in enumerate(rows):
        tokens = inputs["input_ids"][i][valid.bool()]
        prompt = prompts["input_ids"][i][of_prompt.bool()]
        length = min(len(tokens), len(prompt))
        same = (tokens[:length] == prompt[:length]).int().cumprod(dim=0).sum()
        start = labels.shape[1] - len(tokens) + int(same)  # padding is on the left
        labels[i, :start] = _IGNORE
    return labels


def _loss(logits: Tensor, labels: Tensor) -> AnswerLoss:
    """Compute the loss of one row, from its logits [L, V] and labels int64 [L]."""
    chosen = labels[1:] != _IGNORE
    rows, wanted = logits[:-1][chosen].float(), labels[1:][chosen]
    loss = nn.functional.cross_entropy(rows, wanted)
    return AnswerLoss(loss=float(loss), greedy=bool((rows.argmax(dim=-1) == wanted).all()))
