"""Lay a padded batch out as segments: which column goes where, worked out on the host.

    text   = valid & (not a placeholder, or an output is needed there)
    vision = valid & a placeholder & not text
    text_columns, vision_columns = the columns of both, packed to the left
    keep[k] = schedule's count at layer k, row by row

Rows may be padded on either side, hold any number of images, or none. Everything a program needs to
know about a batch is here; only which vision tokens survive is decided on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.methods.queries import Prompt
from hidrop_fx.ops.columns import SHORTEST, pack, rounded_up
from hidrop_fx.planning.event_kinds import EVENT_KINDS
from hidrop_fx.planning.learned_keeps import keep_counts
from hidrop_fx.planning.plan import TEXT, Plan
from hidrop_fx.schedule.keeps import PruneCount

IGNORE = -100
# Tokens of a prompt longer than any.
_ANY = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One batch of B rows and L columns, described on the host.

    A column is a position of the padded prompt; L, one past the last, is the sentinel of what is no token.
    """

    text_columns: Tensor
    """Columns of the text stream, ascending, sentinels last: int64 [B, T]."""
    vision_columns: Tensor
    """Columns of the vision stream, ascending, sentinels last: int64 [B, V]."""
    position_ids: Tensor
    """Position id of every column and of the sentinel, int64 [B, L + 1], or [axes, B, L + 1]."""
    position_copies: Tensor | None
    """All that each column bears, int64 [K, axes, B, L + 1], where the schedule gives tokens K on each axis; the first are
    `position_ids`."""
    is_vision: Tensor
    """True for the columns of the vision stream, bool [B, L + 1]."""
    query_columns: Tensor
    """Columns that score vision tokens, -1 where a row has fewer: int64 [B, Q]."""
    output_columns: Tensor
    """The last valid column, whose output is always needed: int64 [B, 1]."""
    lengths: dict[str, int]
    """Tokens of each segment, invalid ones included, and of each cut that a layer's cache is given."""
    counts: dict[str, list[int]]
    """Valid tokens of each segment and cut, row by row."""
    vision_counts: dict[str, list[int]]
    """Vision tokens among them."""
    columns: int
    """L"""
    last: list[int]
    """Last valid column of each row."""
    next_ids: dict[str, list[int]]
    """Position id of the next token in each segment, row by row."""
    needs_features: bool
    """True if a placeholder stands in the text stream, so that text layers need its feature."""
    images: list[int]
    """Images and videos of each row, as the user gave them."""
    removed: list[int]
    """Vision tokens of each row that were taken out before the decoder, and count for nothing else here."""
    units: list[int]
    """What an int keep counts in each row: its images and videos, or their tiles or frames."""
    stays: dict[str, list[int]]
    """Vision tokens that each prune leaves of those that were there, row by row."""
    merged: dict[str, list[int]]
    """Vision tokens that each prune merges into added ones, where it adds some."""
    added_columns: dict[str, Tensor]
    """Columns of those, the sentinel where a row has fewer: int64 [B, C]."""
    unseen: list[tuple[int, int]]
    """Text and vision tokens of each row before its bottleneck; empty where the schedule has none."""

    plan: Plan

    @property
    def ragged(self) -> bool:
        """True if some row has, or may have, fewer tokens than its segment."""
        schedule = self.plan.schedule
        if schedule.prune and schedule.scorer.most is not None:
            return True
        return any(min(self.counts[name]) < self.lengths[name] for name in self.counts)


def lay_out(
    plan: Plan,
    *,
    valid: Tensor,
    placeholder: Tensor,
    position_ids: Tensor,
    images: Sequence[int],
    units: Sequence[int] | None = None,
    members: Tensor | None = None,
    removed: Sequence[int] | None = None,
    labels: Tensor | None = None,
    needed: Tensor | None = None,
    ratios: Mapping[int, float] | None = None,
    multiple: int = 1,
    vision_multiple: int = 1,
    draft: int = 0,
    room: Tensor | None = None,
    first: Tensor | None = None,
) -> Layout:
    """Describe a batch to the programs of a plan.

    Args:
        valid: bool [B, L], false for padding. placeholder: bool [B, L], true for vision places.
        position_ids: int64 [B, L] or [axes, B, L], the ids that the model would give. All on the CPU.
        images: images of each row.
        units: what an int keep counts in each row; None for its images.
        members: columns whose position ids each column bears, int64 [K, B, L]; None for its own.
        removed: vision tokens of each row that are none of `valid` any more; None for none.
        labels: int64 [B, L]; the positions that predict supervised ones count as text.
        needed: `needed_columns` of these, where they are known; made if None.
        ratios: filter layer -> share of its vision tokens that it drops, in place of the schedule's
            counts.
        draft: tokens at the end that another model proposed; the prompt, which scores, ends before
            them. One row without padding.
        room: bool [B, L], columns behind each row's last vision token that are left for added ones; as many in
            every row, none of them valid. None where no prune adds any.
        first: int64 [B], the first column that caches hold, where the schedule has a bottleneck.
        multiple: the number of text tokens is rounded up to a multiple of it, so that few shapes
            occur. vision_multiple: likewise for vision tokens, before and after every prune.

    Raises:
        InputError: a row holds nothing but padding.
    """
    batch, length = valid.shape
    if length == 0:
        raise InputError("the prompt is empty; input_ids must have at least one column")
    last = torch.where(valid, torch.arange(length, device="cpu"), -1).amax(dim=1)
    ends = last.tolist()
    if min(ends) < 0:
        row = ends.index(-1)
        raise InputError(f"row {row} of the batch is padding only; remove it from the batch")
    if needed is None:
        needed = needed_columns(valid, labels, draft)
    vision = valid & placeholder & ~needed
    text = valid & ~vision

    prompt = Prompt(
        valid=valid,
        text=text,
        last=last - draft,
        answers=None if labels is None else labels != IGNORE,
        multiple=multiple,
    )
    text_counts, vision_counts = torch.stack([text, vision]).sum(dim=2).tolist()
    is_vision = _with_sentinel(vision if room is None else vision | room, False)
    ids, id_copies = _position_ids(plan, position_ids.to(torch.int64), members)
    text_columns = pack(text, most=max(text_counts), multiple=multiple)
    lengths = {TEXT: int(text_columns.shape[1])}
    counts = {TEXT: text_counts}
    surviving = {TEXT: [0] * batch}
    if ratios is None:
        pruned = [
            plan.schedule.prune_counts(v, n, u, num_layers=plan.num_layers)
            for v, n, u in zip(vision_counts, images, units or images, strict=True)
        ]
    else:
        pruned = [
            {k: PruneCount(stays) for k, stays in keep_counts(v, ratios).items()}
            for v in vision_counts
        ]
    kept = [{k: count.left for k, count in row.items()} for row in pruned]
    for event in plan.events:
        name, left = event.name, EVENT_KINDS[event.kind].vision_tokens
        alive = [left(event, v, row) for v, row in zip(vision_counts, kept, strict=True)]
        surviving[name] = alive
        counts[name] = [t + v for t, v in zip(text_counts, alive, strict=True)]
        if multiple == 1:
            lengths[name] = max(SHORTEST, *counts[name])
        else:  # not the sum rounded, which the same two lengths could bring to either of two
            lengths[name] = lengths[TEXT] + rounded_up(max(alive), vision_multiple)
    unseen: list[tuple[int, int]] = []
    if first is None:
        _add_cuts(plan, counts, lengths, multiple)
    else:
        before = torch.arange(length, device="cpu") < first[:, None]
        unseen = list(
            zip(*torch.stack([text & before, vision & before]).sum(dim=2).tolist(), strict=True)
        )
        _add_held(plan, counts, lengths, multiple, unseen)
    prunes = {event.name: event.layer for event in plan.of_kind("prune")}
    merged: dict[str, list[int]] = {}
    added_columns: dict[str, Tensor] = {}
    if room is not None:
        free = pack(room)
        for name, layer in prunes.items():
            merged[name] = [row[layer].merged for row in pruned]
            added = [row[layer].added for row in pruned]
            lengths[f"merged_{name}"] = rounded_up(max(SHORTEST, *merged[name]), vision_multiple)
            found, free = _taken(free, added, added_room(added, vision_multiple), length)
            lengths[f"added_{name}"] = found.shape[1]
            added_columns[name] = found
    for tail in plan.tails:  # what is taken back of a draft leaves as many
        lengths[tail.name] = max(SHORTEST, tail.tokens + draft)
        counts[tail.name] = [min(n, lengths[tail.name]) for n in counts[tail.segment]]
    return Layout(
        text_columns=text_columns,
        vision_columns=pack(vision, most=max(vision_counts), shortest=0, multiple=vision_multiple),
        position_ids=ids,
        position_copies=id_copies,
        is_vision=is_vision,
        query_columns=plan.schedule.scorer.queries(prompt),
        output_columns=last[:, None].clone(),
        lengths=lengths,
        counts=counts,
        vision_counts=surviving,
        columns=length,
        last=ends,
        next_ids=_next_ids(
            plan, ids if ids.dim() == 2 else ids.amax(dim=0), is_vision, last, counts
        ),
        needs_features=bool((text & placeholder).any()),
        images=list(images),
        removed=[0] * batch if removed is None else list(removed),
        units=list(units or images),
        stays={name: [row[layer].stays for row in pruned] for name, layer in prunes.items()},
        merged=merged,
        added_columns=added_columns,
        unseen=unseen,
        plan=plan,
    )


def _position_ids(plan: Plan, ids: Tensor, members: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the first position ids of every column and the sentinel, and all of them where a column bears several."""
    copies = plan.schedule.position_copies
    if members is None and copies == 1:
        return _with_sentinel(ids, 0), None
    if members is not None:
        found = torch.stack([ids.gather(-1, of.expand(ids.shape)) for of in members])
    else:
        found = ids.expand(copies, *ids.shape)
    found = _with_sentinel(found, 0)
    return found[0], found if copies > 1 else None


def added_room(added: Sequence[int], multiple: int) -> int:
    """Count the columns that a prune needs for added tokens, of which rows have so many."""
    return rounded_up(max(SHORTEST, *added), multiple)


def _taken(free: Tensor, added: list[int], room: int, sentinel: int) -> tuple[Tensor, Tensor]:
    """Return the first columns of those that are free, as many as rows have added tokens; and the columns behind `room`."""
    slots = torch.arange(room, device="cpu")
    there = slots < torch.tensor(added, device="cpu")[:, None]
    return torch.where(there, free[:, :room], sentinel), free[:, room:]


def _add_cuts(
    plan: Plan, counts: dict[str, list[int]], lengths: dict[str, int], multiple: int
) -> None:
    """Add what the cache of each layer keeps of its tokens, where the schedule cuts caches."""
    kept, depth = plan.schedule.cut, plan.num_layers
    for cut in plan.cuts:
        if cut.like != cut.name:
            counts[cut.name], lengths[cut.name] = counts[cut.like], lengths[cut.like]
            continue
        assert kept is not None
        found = [kept.kept(tokens, cut.layer, depth) for tokens in counts[cut.segment]]
        most, whole = max(SHORTEST, *found), kept.kept(_ANY, cut.layer, depth)
        # What long prompts leave is one length; only what a shorter one leaves is rounded.
        room = min(rounded_up(most, multiple), whole if most <= whole else lengths[cut.segment])
        counts[cut.name], lengths[cut.name] = found, min(lengths[cut.segment], room)


def _add_held(
    plan: Plan,
    counts: dict[str, list[int]],
    lengths: dict[str, int],
    multiple: int,
    unseen: list[tuple[int, int]],
) -> None:
    """Add what the cache of each layer holds of its tokens, which begins at a bottleneck."""
    for cut in plan.cuts:
        has_vision = plan.segment(cut.segment).reason == "inject"
        found = zip(counts[cut.segment], unseen, strict=True)
        counts[cut.name] = [n - text - has_vision * vision for n, (text, vision) in found]
        room = rounded_up(max(SHORTEST, *counts[cut.name]), multiple)
        lengths[cut.name] = min(lengths[cut.segment], room)


def count_images(placeholder: Tensor, lengths: Sequence[int], kind: str = "image") -> list[int]:
    """Count the images (or items of another kind) of each row, given the tokens of every one in order.

    Raises:
        InputError: placeholders and features do not match, in total or in some row.
    """
    rows = placeholder.sum(dim=1).tolist()
    if sum(rows) != sum(lengths):
        raise InputError(
            f"the prompt has {sum(rows)} {kind} placeholder tokens ({rows} by row), but the {kind}s "
            f"have {sum(lengths)} features ({len(lengths)} {kind}s of {sorted(set(lengths))} tokens); "
            f"build the inputs with the model's processor, one {kind} for each <{kind}> in the text"
        )
    pending = list(lengths)
    counts = []
    for row, places in enumerate(rows):
        taken = 0
        count = 0
        while taken < places:
            taken += pending.pop(0)
            count += 1
        if taken != places:
            raise InputError(
                f"row {row} has {places} {kind} placeholder tokens, which is not a whole number of "
                f"{kind}s: the next ones end at {taken}; was its text truncated?"
            )
        counts.append(count)
    return counts


def needed_columns(valid: Tensor, labels: Tensor | None, draft: int = 0) -> Tensor:
    """Return the columns whose output is needed whatever stands there, bool [B, L].

    The last real one, those that predict a supervised token, and a draft with the column before it.
    """
    columns = torch.arange(valid.shape[1], device="cpu")
    last = torch.where(valid, columns, -1).amax(dim=1).clamp(min=0)
    needed = torch.zeros_like(valid).scatter_(1, last[:, None], True)
    if labels is not None:
        needed[:, :-1] |= (labels[:, 1:] != IGNORE) & valid[:, 1:]
    needed &= valid
    if draft:
        needed[:, valid.shape[1] - draft - 1 :] = True
    return needed


def _next_ids(
    plan: Plan,
    ids: Tensor,
    is_vision: Tensor,
    last: Tensor,
    counts: dict[str, list[int]],
) -> dict[str, list[int]]:
    following = ids.gather(1, last[:, None])[:, 0] + 1
    if plan.schedule.position_rule.renumbers_text:
        following = following - is_vision.sum(dim=1)
    original = following.tolist()
    next_ids = {TEXT: original}
    renumbers, renumbered = plan.schedule.position_rule.renumbers_after_prunes, False
    for event in plan.events:
        renumbered |= renumbers and EVENT_KINDS[event.kind].removes
        next_ids[event.name] = counts[event.name] if renumbered else original
    return next_ids


def _with_sentinel(table: Tensor, value: int | bool) -> Tensor:
    return torch.cat([table, table.new_full((*table.shape[:-1], 1), value)], dim=-1)
