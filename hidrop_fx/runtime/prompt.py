"""A call's prompt: checked, laid out, embedded.

prompt = read_prompt(scheduled, inputs, labels, draft)
layout = lay_out_prompt(scheduled, prompt, encoded.lengths, Rounding())
text = text_embeddings(scheduled, prompt, columns, encoded.outputs)

Over 400 lines: a quarter are the fields of a prompt, each with what it says, and the rest is its checks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hidrop_fx.errors import InputError
from hidrop_fx.models import Modality
from hidrop_fx.models.forward_code import ROUTERS
from hidrop_fx.ops.columns import rounded_up
from hidrop_fx.planning.batch_layout import (
    IGNORE,
    Layout,
    count_images,
    lay_out,
    needed_columns,
)
from hidrop_fx.runtime.bottleneck import bottleneck_of
from hidrop_fx.runtime.embedding import (
    embedded,
    looks_up_rows,
    placeholder_columns,
    within_table,
)
from hidrop_fx.runtime.packing import Packing
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.runtime.transfer import to_host

if TYPE_CHECKING:
    from hidrop_fx.runtime.room import Room


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
    """[B, L, D]; None where the ids are looked up once it is known which belong to the text stream."""
    placeholder: Tensor
    """bool [B, L]: the places of vision tokens."""
    kinds: tuple[Tensor, ...]
    """bool [B, L] each: places of images, of videos, in the order of the family's modalities."""
    valid: Tensor
    """bool [B, L]"""
    position_ids: Tensor
    """int64 [B, L], or [axes, B, L]"""
    labels: Tensor | None
    blocks: Tensor | None
    """int64 [B, L]: which tokens see each other both ways, -1 for none; None where no token has a block."""
    length: int
    """Columns that were given; L may be more."""
    draft: int
    """Columns at the end that an assistant proposed."""
    members: Tensor | None = None
    """Columns whose position ids each column bears, int64 [K, B, L], where a reducer says so; None for its own alone."""
    attended: Tensor | None = None
    """`mask`, where places of images were taken out of `valid` since."""
    bottleneck: Tensor | None = None
    """int64 [B, 2]: first and last column of the tokens through which those behind them see what is before; 0 and -1 in a
    row without. None where the schedule has no bottleneck."""
    room: "Room | None" = None
    """Columns that were added behind the images, for tokens that a prune adds; L counts them."""

    @property
    def mask(self) -> Tensor:
        """bool [B, given length without the draft]: the real columns, as they were given."""
        if self.attended is not None:
            return self.attended
        return self.given_valid[:, : self.length - self.draft]

    @property
    def narrows(self) -> bool:
        """Some row has tokens through which those behind them see what is before."""
        return self.bottleneck is not None and bool((self.bottleneck[:, 1] >= 0).any())

    @property
    def given_valid(self) -> Tensor:
        """`valid` at the columns as they were given, bool [B, L]."""
        return self.valid if self.room is None else self.room.closed(self.valid)

    def as_given(self, rows: Tensor) -> Tensor:
        """Move the rows [B, L, D] of all columns to those that were given, [B, given length, D]."""
        return (rows if self.room is None else self.room.closed(rows))[:, : self.length]

    @cached_property
    def needed(self) -> Tensor:
        """Columns whose output is needed whatever stands there, bool [B, L]."""
        return needed_columns(self.valid, self.labels, self.draft)

    @property
    def removed(self) -> list[int] | None:
        """Vision tokens that a reducer took out of each row; None without one."""
        if self.attended is None:
            return None
        rest = self.given_valid[:, : self.attended.shape[1]]
        return [int(count) for count in (self.attended & ~rest).sum(dim=1)]

    def padded(self, rounding: Rounding) -> "Prompt":
        """Return the prompt with more columns on the right, as many as follow from the rounded lengths."""
        length = self.valid.shape[1]
        vision_stream = self.valid & self.placeholder & ~self.needed
        text, vision = (
            int(stream.sum(dim=1).max()) for stream in (self.valid & ~vision_stream, vision_stream)
        )
        wanted = rounded_up(text, rounding.text) + rounded_up(vision, rounding.vision)
        if wanted < length:  # rows padded far beyond what they hold
            wanted = rounded_up(length, rounding.text)
        if wanted == length:
            return self
        extra = (0, wanted - length)
        return replace(
            self,
            ids=None if self.ids is None else nn.functional.pad(self.ids, extra),
            embeds=None if self.embeds is None else nn.functional.pad(self.embeds, (0, 0, *extra)),
            placeholder=nn.functional.pad(self.placeholder, extra),
            kinds=tuple(nn.functional.pad(places, extra) for places in self.kinds),
            valid=nn.functional.pad(self.valid, extra),
            position_ids=nn.functional.pad(self.position_ids, extra),
            members=None if self.members is None else nn.functional.pad(self.members, extra),
            labels=None
            if self.labels is None
            else nn.functional.pad(self.labels, extra, value=IGNORE),
            blocks=None if self.blocks is None else nn.functional.pad(self.blocks, extra, value=-1),
        )


def check_inputs(scheduled: ScheduledModel, inputs: dict[str, Any]) -> None:
    """Check what every call must have.

    Raises:
        InputError: there are no tokens, or what is asked for is not computed: attention, a loss over routers.
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
    if ROUTERS in scheduled.family.unread and scheduled.requests(inputs, ROUTERS):
        raise InputError(
            f"{ROUTERS}=True adds a loss over the routers' choices, which no compiled model computes; set "
            f"model.config.text_config.{ROUTERS} = False, or call hidrop.restore(model)"
        )
    unread = [name for name in scheduled.family.unread if inputs.get(name) is not None]
    if unread and unread != [ROUTERS]:
        raise InputError(
            f"{', '.join(unread)} would be left out: no compiled model of this class reads it. Leave it "
            "out, or call hidrop.restore(model)"
        )


def read_prompt(
    scheduled: ScheduledModel,
    inputs: dict[str, Any],
    labels: Tensor | None,
    draft: int,
    packing: Packing | None = None,
) -> Prompt:
    """Read and check the prompt of a call.

    Args:
        packing: how its rows stood in those that the call was given; None for as they are.

    Raises:
        InputError: mask, position ids or labels do not go with the tokens.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    blocks = scheduled.family.blocks
    host = _on_host(inputs, labels, () if blocks is None else (blocks.argument,))
    labels = host["labels"]
    kinds = places_of_kinds(scheduled, inputs | {"input_ids": host["input_ids"]})
    for places in kinds:
        places[:, places.shape[1] - draft :] = False  # a draft may repeat one, as a word
    placeholder = kinds[0] if len(kinds) == 1 else torch.stack(kinds).any(dim=0)
    if ids is not None and not looks_up_rows(scheduled.embedding):
        given = ids if packing is None else packing.together(ids)
        known = within_table(scheduled.embedding, scheduled.words(given), scheduled.tokens)
        embeds = embedded(scheduled.embedding, known)
        embeds = embeds if packing is None else packing.split(embeds)
    length = placeholder.shape[1]
    valid = _valid(host["attention_mask"], placeholder)
    if labels is not None:
        _check_labels(labels, valid)
    return Prompt(
        ids=ids,
        embeds=embeds,
        placeholder=placeholder,
        kinds=kinds,
        valid=valid,
        position_ids=_position_ids(scheduled, inputs, host["position_ids"], placeholder),
        labels=labels,
        blocks=None if blocks is None else _blocks(scheduled, host[blocks.argument], valid, draft),
        length=length,
        draft=draft,
        bottleneck=bottleneck_of(scheduled, host["input_ids"], valid, placeholder, draft),
    )


def lay_out_prompt(
    scheduled: ScheduledModel,
    prompt: Prompt,
    lengths: Sequence[Sequence[int]],
    rounding: Rounding,
) -> Layout:
    """Lay a prompt out for the programs of a plan.

    Args:
        lengths: vision tokens of each entry of the features, in order, by kind.

    Raises:
        InputError: placeholders and features do not match.
    """
    items, units = items_of(scheduled, prompt, lengths)
    return lay_out(
        scheduled.plan,
        valid=prompt.valid,
        placeholder=prompt.placeholder,
        position_ids=prompt.position_ids,
        images=items,
        units=units,
        members=prompt.members,
        removed=prompt.removed,
        labels=prompt.labels,
        ratios=None if scheduled.ratios is None else scheduled.ratios.numbers(),
        needed=prompt.needed,
        draft=prompt.draft,
        multiple=rounding.text,
        vision_multiple=rounding.vision,
        first=None if prompt.bottleneck is None else prompt.bottleneck[:, 0],
        room=None if prompt.room is None else prompt.room.places(prompt.valid.shape[1]),
    )


def text_embeddings(
    scheduled: ScheduledModel, prompt: Prompt, columns: Tensor, outputs: Mapping[str, Any]
) -> Tensor:
    """Return the embeddings [B, T, D] at the columns [B, T] of the text stream, its places of images aside.

    Args:
        outputs: of the encoders, by kind.
    """
    embedding, more = scheduled.embedding, scheduled.family.text_embeds
    if prompt.ids is None and more is not None and outputs:
        raise InputError(
            "inputs_embeds do not tell which tokens this model embeds in its own way; pass input_ids"
        )
    if prompt.embeds is not None:
        padded = nn.functional.pad(prompt.embeds, (0, 0, 0, 1))
        found = padded.gather(1, columns[:, :, None].expand(-1, -1, padded.shape[2]))
    if prompt.ids is None:
        return found
    ids = nn.functional.pad(prompt.ids, (0, 1)).to(columns.device).gather(1, columns)
    ids = within_table(embedding, ids, scheduled.tokens)
    if prompt.embeds is None:
        found = embedding(scheduled.words(ids))
    return found if more is None else more(scheduled.base, ids, found, outputs)


def feature_places(prompt: Prompt, device: torch.device) -> Tensor:
    """Return which feature belongs at each column, and any at the sentinel: int64 [B, L + 1].

    Features come kind after kind, each in the order of its places, row after row.
    """
    first, *others = prompt.kinds
    order = first.flatten().cumsum(0).sub(1).clamp(min=0)
    start = 0
    for before, places in zip(prompt.kinds, others, strict=False):
        start += int(before.sum())
        flat = places.flatten()
        order = torch.where(flat, flat.cumsum(0) + (start - 1), order)
    return nn.functional.pad(order.view_as(first), (0, 1)).to(device)


def items_of(
    scheduled: ScheduledModel, prompt: Prompt, lengths: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Return the images and videos of each row, as the user gave them, and what an int keep counts in it."""
    rows, units = [0] * len(prompt.valid), [0] * len(prompt.valid)
    wanted = {"tile": "image", "frame": "video"}.get(scheduled.schedule.per)
    for kind, places, tokens in zip(
        scheduled.family.modalities, prompt.kinds, lengths, strict=True
    ):
        if not tokens and not places.any():
            continue
        if not tokens:
            row = int(places.any(dim=1).nonzero()[0])
            raise InputError(
                f"row {row} has {int(places[row].sum())} {kind.name} placeholder tokens but the call "
                f"has no {kind.name}s; pass {kind.pixels} (the processor makes them from {kind.name}s=...)"
            )
        counts = count_images(places, tokens, kind.name)
        if kind.count is not None:
            counts = kind.count(prompt.ids, places)
        rows = [a + b for a, b in zip(rows, counts, strict=True)]
        if kind.name == wanted:
            assert kind.units is not None  # as `check_units` has seen to
            counts = kind.units(places, tokens, prompt.position_ids)
        units = [a + b for a, b in zip(units, counts, strict=True)]
    return rows, units


def places_of_kinds(scheduled: ScheduledModel, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the places of each kind, bool [B, L] on the CPU."""
    kinds, ids = scheduled.family.modalities, inputs.get("input_ids")
    tokens = scheduled.tokens
    found = []
    for kind, token in zip(kinds, tokens, strict=True):
        if ids is None:
            embeds, given = inputs["inputs_embeds"], kind.given(inputs)
            places = placeholder_columns(scheduled.embedding, token, embeds, images=given).cpu()
        else:
            places = (ids == token).cpu()
        if tokens.count(token) > 1 and not _has_shared_token(kinds, kind, inputs):
            places = torch.zeros_like(places)
        found.append(places)
    return tuple(found)


def _has_shared_token(kinds: Sequence[Modality], kind: Modality, inputs: dict[str, Any]) -> bool:
    """Return True if places of a token that several kinds have belong to this one in a call.

    Raises:
        InputError: the call has items of several kinds.
    """
    given = [other for other in kinds if other.given(inputs)]
    if len(given) > 1:
        raise InputError(
            f"this model has one placeholder token for {' and '.join(k.name + 's' for k in given)}, so that "
            "a call may have only one kind; run them in calls of their own"
        )
    return kind is (given[0] if given else kinds[0])


def _on_host(
    inputs: dict[str, Any], labels: Tensor | None, more: tuple[str, ...]
) -> dict[str, Tensor | None]:
    """Return what a layout is made from, on the host: one wait for the device, not one for each."""
    names = ("input_ids", "attention_mask", "position_ids", *more)
    found: dict[str, Tensor | None] = {name: inputs.get(name) for name in names}
    found["labels"] = labels
    given = {name: value for name, value in found.items() if value is not None}
    return found | dict(zip(given, to_host(list(given.values())), strict=True))


def _valid(attention_mask: Tensor | None, placeholder: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(placeholder)
    if attention_mask.shape != placeholder.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a compiled model takes the "
            f"2-D mask of its input_ids, {tuple(placeholder.shape)}, true or 1 for real tokens"
        )
    return attention_mask.bool()


def _blocks(
    scheduled: ScheduledModel, given: Tensor | None, valid: Tensor, draft: int
) -> Tensor | None:
    """Return the block of each column, int64 [B, L]; None where no real token has one."""
    blocks = scheduled.family.blocks
    assert blocks is not None
    if given is None:
        if blocks.required and scheduled.model.training:
            raise InputError(
                f"{type(scheduled.model).__name__} is trained with {blocks.argument}, which tells the images whose "
                "tokens see each other both ways; the processor returns it, pass it on"
            )
        return None
    length = valid.shape[1]
    missing = length - given.shape[-1]
    if given.dim() != 2 or len(given) != len(valid) or not 0 <= missing <= draft:
        raise InputError(
            f"{blocks.argument} has shape {tuple(given.shape)}; it must be that of the tokens, "
            f"{tuple(valid.shape)}, as the processor returns it"
        )
    found = nn.functional.pad(blocks.of(given), (0, missing), value=-1)
    found[:, length - draft :] = -1
    return found if bool(((found >= 0) & valid).any()) else None


def _position_ids(
    scheduled: ScheduledModel, inputs: dict[str, Any], ids: Tensor | None, placeholder: Tensor
) -> Tensor:
    """Return the ids that are given, or that the model would make: int64 [B, L], or [axes, B, L]."""
    family = scheduled.family
    shape = (family.axes, *placeholder.shape) if family.axes > 1 else placeholder.shape
    if ids is None and family.position_ids is not None:
        made = family.position_ids(scheduled.base, inputs)
        if made is not None:
            return made[-family.axes :].cpu() if made.dim() == 3 else made.cpu().expand(shape)
    if ids is None:
        return torch.arange(placeholder.shape[1], device="cpu").expand(shape)
    by_axis = ids.dim() == 3 and len(ids) >= family.axes > 1
    rows = (1, shape[-2]) if ids.dim() > 1 else (ids.shape[0],)
    if ids.dim() > 2 + by_axis or ids.shape[-1] != shape[-1] or ids.shape[by_axis] not in rows:
        raise InputError(
            f"position_ids has shape {tuple(ids.shape)}; this model takes ids of its tokens, {tuple(shape)}, or one row of "
            "them for all; leave it out to have them made"
        )
    if by_axis:  # ids of the text alone may come before the axes
        return ids[-family.axes :].expand(shape)
    return ids.expand(shape)


def _check_labels(labels: Tensor, valid: Tensor) -> None:
    if labels.shape != valid.shape:
        raise InputError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(valid.shape)}")
    if bool(((labels != IGNORE) & ~valid).any()):
        raise InputError(
            f"labels supervise padding; set them to {IGNORE} where attention_mask is 0"
        )
