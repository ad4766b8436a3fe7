"""The stage before the decoder: a call's images with fewer tokens, and its prompt without the others' places.

    with watching(scheduled) as tower:
        encoded = encode(...)
    prompt, encoded = reduced(scheduled, prompt, encoded, tower)

A place that does not stay is handled as padding is: it is no token, and no layer sees it. Where an output is needed at a
place of an image (the last of the prompt, one before an answer), that token stays as it was, beside those that are chosen.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hidrop_fx.errors import InputError, PassError
from hidrop_fx.methods.reducers import Reduction
from hidrop_fx.models.encoding import Encoded
from hidrop_fx.models.family import Modality
from hidrop_fx.models.tower_tokens import TowerWatch, projected
from hidrop_fx.planning.batch_layout import IGNORE, count_images, needed_columns
from hidrop_fx.runtime.embedding import embedded, within_table
from hidrop_fx.runtime.prompt import Prompt
from hidrop_fx.runtime.relevance import given_text
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.schedule.schedule import Schedule


def watched_tower(scheduled: ScheduledModel) -> AbstractContextManager[TowerWatch | None]:
    """Watch the vision tower where the schedule's reducer reads it."""
    reduction = scheduled.schedule.reduction
    if reduction is None or scheduled.dry_run or not reduction.reducer.reads_tower:
        return nullcontext()
    return TowerWatch(scheduled.base, reduction)


def reduced(
    scheduled: ScheduledModel,
    prompt: Prompt,
    encoded: Encoded,
    tower: TowerWatch | None,
    copies: int,
) -> tuple[Prompt, Encoded]:
    """Return a prompt and its features with the tokens that the schedule's reducer leaves.

    Args:
        copies: rows that stand one behind another for each row whose images the tower has seen.

    Raises:
        InputError: placeholders and features do not match, or what the reducer needs is not there.
    """
    reduction = scheduled.schedule.reduction
    if reduction is None or not encoded.features:
        return prompt, encoded
    needed = needed_columns(prompt.valid, prompt.labels, prompt.draft)
    features: list[Tensor] = []
    lengths: list[list[int]] = []
    kinds: list[Tensor] = []
    start, members = 0, None
    text = _text_of(scheduled, reduction, prompt, encoded.features[0].shape[-1])
    if reduction.copies > 1 or reduction.reducer.members:
        columns = torch.arange(prompt.valid.shape[1], device="cpu")
        members = columns.expand(reduction.copies, *prompt.valid.shape).clone()
    for kind, places, tokens in zip(
        scheduled.family.modalities, prompt.kinds, encoded.lengths, strict=True
    ):
        entries = encoded.features[start : start + len(tokens)]
        start += len(tokens)
        if not tokens:
            kinds.append(places)
            lengths.append([])
            continue
        rows = count_images(places, tokens, kind.name)
        of_row = torch.arange(len(rows), device="cpu").repeat_interleave(torch.tensor(rows))
        seen = _seen(rows, copies)
        frames = _frames(reduction, prompt, kind, places, tokens)
        pieces = [piece for e, n in zip(entries, frames, strict=True) for piece in e.chunk(n)]
        kept, pieces, borne = _reduced_entries(
            scheduled,
            reduction,
            text,
            pieces,
            of_row.repeat_interleave(torch.tensor(frames)),
            needed[places],
            tower,
            [image for image, n in zip(seen, frames, strict=True) for _ in range(n)],
        )
        stays = places.clone()
        stays[places] = torch.cat(kept)
        kinds.append(stays)
        if members is not None:
            own = places.nonzero()[:, 1]
            members[:, places] = own[torch.cat(borne).T]
        left = [int(each.sum()) for each in torch.cat(kept).split(tokens)]
        lengths.append(left)
        features += torch.cat(pieces).split(left)
    return (
        replace(shortened(scheduled, prompt, kinds, encoded.lengths), members=members),
        replace(encoded, features=features, lengths=tuple(lengths)),
    )


def reduced_blank(
    scheduled: ScheduledModel, prompt: Prompt, encoded: Encoded, tower: TowerWatch | None
) -> list[Tensor]:
    """Run the reducer on a blank image, whose tokens go nowhere: other processes call the same modules for their images.

    Returns:
        Features [keep, D] that the projector made a second time, if it did.
    """
    reduction = scheduled.schedule.reduction
    if reduction is None or not reduction.reducer.needs:
        return []
    text = _text_of(scheduled, reduction, prompt, encoded.features[0].shape[-1])
    row = torch.zeros(1, dtype=torch.int64, device="cpu")
    _, rows, _ = _run(scheduled, reduction, encoded.features[:1], (0,), row, text, tower, (0,))
    return [each for each in rows if each is not None]


def shortened(
    scheduled: ScheduledModel,
    prompt: Prompt,
    kinds: Sequence[Tensor],
    lengths: Sequence[Sequence[int] | None],
) -> Prompt:
    """Return a prompt without the places that are gone.

    Args:
        kinds: bool [B, L] each, the places that stay, by kind.
        lengths: tokens that each entry had, by kind; None for a kind of which all stay.
    """
    placeholder = torch.stack(list(kinds)).any(dim=0)
    gone = prompt.placeholder & ~placeholder
    return replace(
        prompt,
        placeholder=placeholder,
        kinds=tuple(kinds),
        valid=prompt.valid & ~gone,
        attended=prompt.mask,
        position_ids=_position_ids(scheduled, prompt, gone, lengths),
    )


def needs_pixels(schedule: Schedule, reason: str) -> InputError:
    """Return the error of a call that has features in the place of pixels."""
    return InputError(
        f"before={schedule.before} needs the pixels of the call, {reason}: mm_encoder_outputs holds what the projector "
        "made of them. (Assisted decoding encodes images beforehand: leave the assistant out)"
    )


def _reduced_entries(
    scheduled: ScheduledModel,
    reduction: Reduction,
    text: Tensor | None,
    entries: Sequence[Tensor],
    of_row: Tensor,
    needed: Tensor,
    tower: TowerWatch | None,
    seen: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return which tokens of each entry stay, bool [n] on the host, and their features [m, D].

    Third, places of the tokens of all entries whose position ids each token bears, int64 [n, K] on the host: its own, K times,
    where a reducer does not say.

    Args:
        of_row: the row of each entry. needed: tokens of all entries that stay in any case, bool.
        seen: which image of the tower each entry is.
    """
    kept: list[Tensor] = [torch.empty(0)] * len(entries)
    found: list[Tensor] = list(entries)
    lengths = [len(entry) for entry in entries]
    forced = needed.split(lengths)
    own = torch.arange(len(needed), device="cpu")[:, None].repeat(1, reduction.copies)
    borne, starts = list(own.split(lengths)), [0, *accumulate(lengths)]
    for length in dict.fromkeys(len(entry) for entry in entries):
        alike = [i for i, entry in enumerate(entries) if len(entry) == length]
        places, rows, members = _run(
            scheduled, reduction, entries, alike, of_row, text, tower, seen
        )
        for i, chosen, row, of in zip(alike, places, rows, members, strict=True):
            kept[i] = forced[i].clone()
            kept[i][chosen] = True
            if of is not None:
                ids = borne[i].index_copy(0, chosen, of + starts[i])
                borne[i] = torch.where(forced[i][:, None], borne[i], ids)
            table = entries[i]
            if row is not None:
                table = table.index_copy(0, chosen.to(table.device), row)
                if bool(forced[i].any()):  # what stays as it was takes no part in a merge's place
                    table = torch.where(forced[i][:, None].to(table.device), entries[i], table)
            found[i] = table[kept[i].nonzero().flatten().to(table.device)]
    return kept, found, borne


def _run(
    scheduled: ScheduledModel,
    reduction: Reduction,
    entries: Sequence[Tensor],
    alike: Sequence[int],
    of_row: Tensor,
    text: Tensor | None,
    tower: TowerWatch | None,
    seen: Sequence[int],
) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Run the reducer on entries of one length; return places [E, m] on the host, and rows [E, m, D] if it makes some.

    Third, places [E, m, K] on the host whose position ids each bears, if it says so.
    """
    reducer, features = reduction.reducer, torch.stack([entries[i] for i in alike])
    try:
        keep = reduction.kept(features.shape[1])
    except ValueError as error:
        raise InputError(f"before={reduction}: {error}") from None
    if scheduled.dry_run:
        none = [None] * len(alike)
        return torch.arange(keep, device="cpu").expand(len(alike), -1), none, none
    arguments = dict(reduction.arguments)
    if text is not None:
        arguments["text"] = text[of_row[list(alike)]].to(features.device)
    if reducer.reads_tower:
        if tower is None or not tower.ran:
            raise needs_pixels(scheduled.schedule, "since it reads the vision tower")
        arguments["tower"] = tower.tokens(
            [seen[i] for i in alike], images=max(seen) + 1, patches=features.shape[1]
        )
        if arguments["tower"].cls is None:
            scheduled.log_once(
                f"before={reduction}: the vision tower has no class token beside an image's {features.shape[1]} features: "
                "they are chosen by the mean attention that each receives"
            )
    found = reducer.function(features, keep, **arguments)
    members: Sequence[Tensor | None] = [None] * len(alike)
    if reducer.members:
        *found, of = found
        found, members = tuple(found), list(of.cpu())
    places, rows = _checked(found, features, keep, reduction)
    if rows is None:
        return places, [None] * len(alike), members
    if reducer.reads_tower:
        rows = projected(scheduled.base, rows)
    return places, list(rows.to(features.dtype)), members


def _checked(
    found: Any, features: Tensor, keep: int, reduction: Reduction
) -> tuple[Tensor, Tensor | None]:
    """Check what a reducer returned, and bring the places [E, keep] to the host; rows [E, keep, ...] or None.

    Raises:
        PassError: it is something else; says what.
    """
    expected = (len(features), keep)
    shown: object = found
    if isinstance(found, tuple) and len(found) == 2:
        places, rows = found
        shown = [list(each.shape) if isinstance(each, Tensor) else each for each in found]
        fits = isinstance(places, Tensor) and places.dtype == torch.int64
        fits = fits and places.shape == expected and (rows is None or rows.shape[:2] == expected)
        if fits:
            on_host = places.cpu()  # the one wait for the device
            if _ascends(on_host, features.shape[1]):
                return on_host, rows
    raise PassError(
        f"before={reduction} returned {shown} for features {list(features.shape)}: return places, int64 "
        f"{list(expected)}, ascending in 0 to {features.shape[1] - 1}, and rows [{len(features)}, {keep}, ...] or None"
    )


def _ascends(places: Tensor, tokens: int) -> bool:
    """Return True if the places of each image ascend, among so many tokens."""
    edges = places.new_tensor([-1, tokens]).expand(len(places), 2)
    return bool((torch.cat([edges[:, :1], places, edges[:, 1:]], dim=1).diff(dim=1) > 0).all())


def _frames(
    reduction: Reduction, prompt: Prompt, kind: Modality, places: Tensor, tokens: Sequence[int]
) -> list[int]:
    """Return how many frames each entry has that are reduced one by one: 1 but for videos.

    A frame begins where height and width are those of the entry's first token.

    Args:
        places: of the kind, bool [B, L]. tokens: of each entry.

    Raises:
        InputError: position ids are those of plain text, which do not tell frames apart.
    """
    if not reduction.reducer.per_frame or kind.name != "video" or prompt.position_ids.dim() == 2:
        return [1] * len(tokens)
    found = []
    for row, columns in _by_entry(places, tokens):
        time, sides = prompt.position_ids[0, row, columns], prompt.position_ids[-2:, row, columns]
        if len(columns) > 1 and bool((sides == time).all()):
            raise InputError(
                f"before={reduction} merges the tokens of each frame, and the position ids of this call's videos are those of "
                "text, which do not tell frames; pass mm_token_type_ids, as the model's processor returns them"
            )
        count = int((sides == sides[:, :1]).all(dim=0).sum())
        found.append(count if len(columns) % count == 0 else 1)
    return found


def _by_entry(places: Tensor, tokens: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return the row of each entry, and the columns [n] of its places."""
    rows, columns = places.nonzero(as_tuple=True)
    parts = zip(rows.split(list(tokens)), columns.split(list(tokens)), strict=True)
    return [(int(row[0]), own) for row, own in parts]


def _seen(images: Sequence[int], copies: int) -> list[int]:
    """Return which image of the tower each image is, where `copies` rows in a row have the same.

    Args:
        images: of each row.
    """
    found, start = [], 0
    for first in range(0, len(images), copies):
        count = images[first]
        found += list(range(start, start + count)) * copies
        start += count
    return found


def _text_of(
    scheduled: ScheduledModel, reduction: Reduction, prompt: Prompt, width: int
) -> Tensor | None:
    """Return what a reducer that reads text is handed, fp32 [B, D]: given features, or `_mean_text`.

    The embedding is looked up once a call in any case, as it is in every process that shards it.
    """
    if "text" not in reduction.reducer.needs or scheduled.dry_run:
        return None
    text = _mean_text(scheduled, prompt)
    given = given_text(scheduled.model, rows=len(text), width=width)
    return text if given is None else given.to(text.device)


def _mean_text(scheduled: ScheduledModel, prompt: Prompt) -> Tensor:
    """Return the mean of the normalised embeddings of the text tokens of each row's prompt, fp32 [B, D]."""
    with torch.no_grad():
        embeds = prompt.embeds
        if embeds is None:
            assert prompt.ids is not None
            known = within_table(scheduled.embedding, prompt.ids, scheduled.tokens)
            embeds = embedded(scheduled.embedding, known)
        text = prompt.valid & ~prompt.placeholder
        if prompt.labels is not None:  # answers are not known when an image is reduced for them
            text &= prompt.labels == IGNORE
        text[:, text.shape[1] - prompt.draft :] = False
        text = text.to(embeds.device)
        unit = normalize(embeds.float(), dim=-1) * text[:, :, None]
        return unit.sum(dim=1) / text.sum(dim=1)[:, None].clamp(min=1)


def _position_ids(
    scheduled: ScheduledModel,
    prompt: Prompt,
    gone: Tensor,
    lengths: Sequence[Sequence[int] | None],
) -> Tensor:
    """Return the ids of a prompt without the places that are gone, by the schedule's rule."""
    rule = scheduled.schedule.position_rule
    if rule.renumbers_after_prunes:
        stays = prompt.valid & ~gone
        return (stays.cumsum(dim=1) - 1).clamp(min=0).expand(prompt.position_ids.shape)
    if rule.renumbers_text:  # the rule itself counts the places that stay
        before = gone.cumsum(dim=1)
        return torch.where(prompt.placeholder, prompt.position_ids, prompt.position_ids - before)
    if rule.closes_gaps:
        return _without_gaps(prompt, gone, lengths)
    return prompt.position_ids


def _without_gaps(prompt: Prompt, gone: Tensor, lengths: Sequence[Sequence[int] | None]) -> Tensor:
    """Return ids by which what follows an entry begins behind the largest id that is left of it, or where it began."""
    ids = prompt.position_ids.clone()
    items: list[tuple[int, Tensor]] = []
    for places, tokens in zip(prompt.kinds, lengths, strict=True):
        items += _by_entry(places, tokens) if tokens else []
    for row, columns in sorted(items, key=lambda item: (item[0], int(item[1][0]))):
        out, behind = gone[row, columns], int(columns[-1]) + 1
        following = prompt.valid[row, behind:].nonzero()
        if len(following) == 0 or not bool(out.any()):
            continue
        own = ids[..., row, :]
        left = own[..., columns[~out]]
        end = left.amax() + 1 if left.numel() else own[..., columns].amin()
        own[..., behind:] -= own[..., behind + int(following[0])].amin() - end
    return ids
