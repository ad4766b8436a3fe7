"""A call's prompt: checked, laid out, embedded.

prompt = read_prompt(scheduled, inputs, labels, draft)
layout = lay_out_prompt(scheduled, prompt, image_lengths, Rounding())
text = text_embeddings(scheduled, prompt, layout, columns)
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.errors import InputError
from hidrop_fx.ops.columns import rounded_up
from hidrop_fx.planning.batch_layout import IGNORE, Layout, count_images, lay_out
from hidrop_fx.runtime.scheduled_model import ScheduledModel


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Multiples that lengths are rounded up to, so that shapes come again."""

    text: int = 1
    vision: int = 1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A batch of B rows and L columns: tokens or embeddings on their device, the rest on the CPU."""

    ids: Tensor | None
    embeds: Tensor | None
    placeholder: Tensor
    """bool [B, L]: the places of vision tokens."""
    valid: Tensor
    """bool [B, L]"""
    position_ids: Tensor
    """int64 [B, L]"""
    labels: Tensor | None
    length: int
    """Columns that were given; L may be more."""
    draft: int
    """Columns at the end that an assistant proposed."""

    @property
    def mask(self) -> Tensor:
        """bool [B, given length without the draft]"""
        return self.valid[:, : self.length - self.draft]

    def padded(self, rounding: Rounding) -> "Prompt":
        """Return the prompt with more columns on the right, as many as follow from the rounded lengths."""
        length = self.valid.shape[1]
        text = int((self.valid & ~self.placeholder).sum(dim=1).max())
        vision = int((self.valid & self.placeholder).sum(dim=1).max())
        wanted = rounded_up(text, rounding.text) + rounded_up(vision, rounding.vision)
        if wanted < length:  # rows padded far beyond what they hold
            wanted = rounded_up(length, rounding.text)
        extra = (0, wanted - length)
        return replace(
            self,
            ids=None if self.ids is None else nn.functional.pad(self.ids, extra),
            embeds=None if self.embeds is None else nn.functional.pad(self.embeds, (0, 0, *extra)),
            placeholder=nn.functional.pad(self.placeholder, extra),
            valid=nn.functional.pad(self.valid, extra),
            position_ids=nn.functional.pad(self.position_ids, extra),
            labels=None
            if self.labels is None
            else nn.functional.pad(self.labels, extra, value=IGNORE),
        )


def check_inputs(scheduled: ScheduledModel, inputs: dict[str, Any]) -> None:
    """Check what every call must have.

    Raises:
        InputError: there are no tokens, or attention is asked for.
    """
    if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
        raise InputError("pass exactly one of input_ids and inputs_embeds")
    ids = inputs.get("input_ids")
    if ids is not None and (ids.dim() != 2 or ids.numel() == 0):
        raise InputError(
            f"input_ids has shape {tuple(ids.shape)}; it must be [batch, length], neither zero"
        )
    if scheduled.requests(inputs, "output_attentions"):
        raise InputError(
            "output_attentions=True is not available: the attention of a compiled model is fused. "
            "Call hidrop.restore(model) to look inside the original"
        )


def read_prompt(
    scheduled: ScheduledModel, inputs: dict[str, Any], labels: Tensor | None, draft: int
) -> Prompt:
    """Read and check the prompt of a call.

    Raises:
        InputError: mask, position ids or labels do not go with the tokens.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    placeholder = _placeholders(scheduled, ids, embeds)
    _warn_of_hidden_images(scheduled, ids, placeholder)
    length = placeholder.shape[1]
    placeholder[:, length - draft :] = False  # a draft may repeat one, as a word
    valid = _valid(inputs.get("attention_mask"), placeholder)
    if labels is not None:
        labels = labels.cpu()
        _check_labels(labels, valid)
    return Prompt(
        ids=ids,
        embeds=embeds,
        placeholder=placeholder,
        valid=valid,
        position_ids=_position_ids(inputs, placeholder),
        labels=labels,
        length=length,
        draft=draft,
    )


def lay_out_prompt(
    scheduled: ScheduledModel, prompt: Prompt, images: Sequence[int], rounding: Rounding
) -> Layout:
    """Lay a prompt out for the programs of a plan.

    Args:
        images: vision tokens of each image, in order.

    Raises:
        InputError: placeholders and images do not match.
    """
    placeholder = prompt.placeholder
    if not images and placeholder.any():
        row = int(placeholder.any(dim=1).nonzero()[0])
        raise InputError(
            f"row {row} has {int(placeholder[row].sum())} image placeholder tokens but the call "
            "has no images; pass pixel_values (the processor makes them from images=...)"
        )
    return lay_out(
        scheduled.plan,
        valid=prompt.valid,
        placeholder=placeholder,
        position_ids=prompt.position_ids,
        images=count_images(placeholder, images),
        labels=prompt.labels,
        ratios=None if scheduled.ratios is None else scheduled.ratios.numbers(),
        draft=prompt.draft,
        multiple=rounding.text,
        vision_multiple=rounding.vision,
    )


def text_embeddings(embedding: nn.Module, prompt: Prompt, columns: Tensor) -> Tensor:
    """Return the embeddings [B, T, D] at the columns [B, T] of the text stream, its places of images aside."""
    if prompt.embeds is None:
        assert prompt.ids is not None
        ids = nn.functional.pad(prompt.ids, (0, 1)).to(columns.device)
        embedded: Tensor = embedding(ids.gather(1, columns))
        return embedded
    padded = nn.functional.pad(prompt.embeds, (0, 0, 0, 1))
    return padded.gather(1, columns[:, :, None].expand(-1, -1, padded.shape[2]))


def feature_places(prompt: Prompt, device: torch.device) -> Tensor:
    """Return which feature belongs at each column, and any at the sentinel: int64 [B, L + 1].

    Features come in the order of their places, row after row.
    """
    order = prompt.placeholder.flatten().cumsum(0).sub(1).clamp(min=0)
    return nn.functional.pad(order.view_as(prompt.placeholder), (0, 1)).to(device)


def _placeholders(scheduled: ScheduledModel, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    token = scheduled.family.placeholder(scheduled.model.config)
    if ids is not None:
        return (ids == token).cpu()
    embedding = scheduled.embedding
    vector = embedding(torch.tensor(token, device=embedding.weight.device))
    assert embeds is not None
    return (embeds == vector).all(dim=-1).cpu()


def _warn_of_hidden_images(
    scheduled: ScheduledModel, ids: Tensor | None, placeholder: Tensor
) -> None:
    if ids is None and not scheduled.schedule.identity and not placeholder.any():
        scheduled.log_once(
            "inputs_embeds without a placeholder token's embedding: every token counts as text, and the "
            "schedule finds no vision token. Leave the image's places as the placeholder's embedding, "
            "and pass pixel_values or mm_encoder_outputs",
            logging.WARNING,
        )


def _valid(attention_mask: Tensor | None, placeholder: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(placeholder)
    if attention_mask.shape != placeholder.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a compiled model takes the "
            f"2-D mask of its input_ids, {tuple(placeholder.shape)}, true or 1 for real tokens"
        )
    return attention_mask.cpu().bool()


def _position_ids(inputs: dict[str, Any], placeholder: Tensor) -> Tensor:
    ids: Tensor | None = inputs.get("position_ids")
    if ids is None:
        return torch.arange(placeholder.shape[1]).expand(placeholder.shape)
    unmasked = inputs.get("attention_mask") is None and inputs.get("past_key_values") is None
    if unmasked and bool((ids.diff(dim=-1) != 1).any()):
        raise InputError(
            "position_ids start anew within a row and there is no attention_mask: these are "
            "packed sequences, which a compiled model cannot keep apart; pad them instead"
        )
    return ids.cpu().expand(placeholder.shape)


def _check_labels(labels: Tensor, valid: Tensor) -> None:
    if labels.shape != valid.shape:
        raise InputError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(valid.shape)}")
    if bool(((labels != IGNORE) & ~valid).any()):
        raise InputError(
            f"labels supervise padding; set them to {IGNORE} where attention_mask is 0"
        )
