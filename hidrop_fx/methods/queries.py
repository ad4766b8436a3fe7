"""Query rules: the rows of a prompt that score its vision tokens, as columns int64 [B, Q], -1 where a row has fewer.

    last_prompt_token(prompt)        # in training the position before each answer
    last_round(prompt)               # in training before the last answer alone
    all_text(prompt)                 # every text token of the prompt
    question(prompt)                 # the text behind the last image, but for its first two tokens
    behind_images(prompt)            # all of the text behind the last image

A function of your own takes a `Prompt` too; `prompt.columns(mask)` packs a mask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Where lengths are rounded up, so many dialogue rounds at least.
_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A padded batch of B rows and L columns, on the CPU."""

    valid: Tensor
    """bool [B, L], false for padding."""
    text: Tensor
    """bool [B, L], positions of the text stream."""
    last: Tensor
    """int64 [B], the last column of each row's prompt."""
    answers: Tensor | None = None
    """bool [B, L], supervised positions; None in generation."""
    multiple: int = 1
    """Numbers of columns are rounded up to a multiple of it, so that few shapes occur."""

    def columns(self, chosen: Tensor, *, multiple: int | None = None) -> Tensor:
        """Pack the columns of a mask bool [B, L]: int64 [B, Q], -1 where a row has fewer.

        A row with none of its own is scored by its last prompt token. Q is at least 2.
        """
        from hidrop_fx.ops.columns import pack

        chosen = chosen.clone()
        none = ~chosen.any(dim=1)
        chosen[none] = chosen[none].scatter_(1, self.last[none][:, None], True)
        packed = pack(chosen, multiple=self.multiple if multiple is None else multiple)
        return packed.masked_fill(packed == chosen.shape[1], -1)


Queries = Callable[[Prompt], "Tensor"]


def last_prompt_token(prompt: Prompt) -> Tensor:
    """Select the last prompt token; in training each position before an answer, one a dialogue round."""
    if prompt.answers is None:
        return prompt.last[:, None].clone()
    before = prompt.valid.new_zeros(prompt.valid.shape)
    before[:, :-1] = ~prompt.answers[:, :-1] & prompt.answers[:, 1:]
    before[:, :-1] &= prompt.valid[:, :-1] & prompt.valid[:, 1:]
    return prompt.columns(before, multiple=min(prompt.multiple, _ROUNDS))


def last_round(prompt: Prompt) -> Tensor:
    """Select the last prompt token; in training the position before the last answer."""
    return last_prompt_token(prompt).amax(dim=1, keepdim=True)


def question(prompt: Prompt) -> Tensor:
    """Select the text from the third token behind a row's last image on, answers aside; its last token if there is none."""
    return _behind_images(prompt, 2)


def behind_images(prompt: Prompt) -> Tensor:
    """Select the text behind a row's last image, answers aside; its last token if there is none."""
    return _behind_images(prompt, 0)


def _behind_images(prompt: Prompt, but: int) -> Tensor:
    places = prompt.valid.cumsum(dim=1)
    images = (places * (prompt.valid & ~prompt.text)).amax(dim=1, keepdim=True)
    asked = prompt.text & (places > images + but)
    asked = asked & (places <= places.gather(1, prompt.last[:, None]))
    return prompt.columns(asked if prompt.answers is None else asked & ~prompt.answers)


def all_text(prompt: Prompt) -> Tensor:
    """Select every text token of the prompt, answers aside."""
    if prompt.answers is None:
        return prompt.columns(prompt.text)
    return prompt.columns(prompt.text & ~prompt.answers)
