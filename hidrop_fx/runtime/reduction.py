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

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hidrop_fx.errors import InputError
from hidrop_fx.methods.reducers import Reduction
from hidrop_fx.models.encoding import Encoded
from hidrop_fx.models.tower_tokens import TowerWatch, projected
from hidrop_fx.planning.batch_layout import count_images, needed_columns
from hidrop_fx.runtime.embedding import embedded, within_table
from hidrop_fx.runtime.prompt import Prompt
from hidrop_fx.runtime.scheduled_model import ScheduledModel


def watched_tower(scheduled: ScheduledModel) -> AbstractContextManager[TowerWatch | None]:
    """Watch the vision tower where the schedule's reducer reads it."""
    reduction = scheduled.schedule.reduction
    if reduction is None or "tower" not in reduction.reducer.needs:
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
    start = 0
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
        kept, entries = _reduced_entries(
            scheduled,
            reduction,
            prompt,
            entries,
            of_row,
            needed[places],
            tower,
            _seen(rows, copies),
        )
        stays = places.clone()
        stays[places] = torch.cat(kept)
        kinds.append(stays)
        lengths.append([int(each.sum()) for each in kept])
        features += entries
    placeholder = torch.stack(kinds).any(dim=0)
    gone = prompt.placeholder & ~placeholder
    return (
        replace(
            prompt,
            placeholder=placeholder,
            kinds=tuple(kinds),
            valid=prompt.valid & ~gone,
            attended=prompt.mask,
            position_ids=_position_ids(scheduled, prompt, gone),
        ),
        replace(encoded, features=features, lengths=tuple(lengths)),
    )


def _reduced_entries(
    scheduled: ScheduledModel,
    reduction: Reduction,
    prompt: Prompt,
    entries: Sequence[Tensor],
    of_row: Tensor,
    needed: Tensor,
    tower: TowerWatch | None,
    seen: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return which tokens of each entry stay, bool [n] on the host, and their features [m, D].

    Args:
        of_row: the row of each entry. needed: tokens of all entries that stay in any case, bool.
        seen: which image of the tower each entry is.
    """
    kept: list[Tensor] = [torch.empty(0)] * len(entries)
    found: list[Tensor] = list(entries)
    forced = needed.split([len(entry) for entry in entries])
    for length in dict.fromkeys(len(entry) for entry in entries):
        alike = [i for i, entry in enumerate(entries) if len(entry) == length]
        places, rows = _run(scheduled, reduction, prompt, entries, alike, of_row, tower, seen)
        for i, chosen, row in zip(alike, places, rows, strict=True):
            stays = torch.zeros(length, dtype=torch.bool, device="cpu")
            stays[chosen.cpu()] = True
            table = entries[i] if row is None else entries[i].index_copy(0, chosen, row)
            # A token that stays as it was takes no part in a merge's place.
            table = torch.where(forced[i][:, None].to(table.device), entries[i], table)
            kept[i] = stays | forced[i]
            found[i] = table[kept[i].to(table.device)]
    return kept, found


def _run(
    scheduled: ScheduledModel,
    reduction: Reduction,
    prompt: Prompt,
    entries: Sequence[Tensor],
    alike: Sequence[int],
    of_row: Tensor,
    tower: TowerWatch | None,
    seen: Sequence[int],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Run the reducer on entries of one length; return places [E, m], and rows [E, m, D] where it makes some."""
    reducer, features = reduction.reducer, torch.stack([entries[i] for i in alike])
    try:
        keep = reduction.kept(features.shape[1])
    except ValueError as error:
        raise InputError(f"before={reduction}: {error}") from None
    arguments = dict(reduction.arguments)
    if "text" in reducer.needs:
        rows_of = of_row[list(alike)]
        arguments["text"] = _mean_text(scheduled, prompt)[rows_of].to(features.device)
    if "tower" in reducer.needs:
        if tower is None or not tower.ran:
            raise InputError(
                f"before={reduction} needs the pixels of the call, since it reads the vision tower: "
                "mm_encoder_outputs holds what the projector made of them. (Assisted decoding encodes "
                "images beforehand: leave the assistant out)"
            )
        arguments["tower"] = tower.tokens(
            [seen[i] for i in alike], images=max(seen) + 1, patches=features.shape[1]
        )
    places, rows = reducer.function(features, keep, **arguments)
    if rows is None:
        return places, [None] * len(alike)
    if "tower" in reducer.needs:
        rows = projected(scheduled.base, rows)
    return places, list(rows.to(features.dtype))


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


def _mean_text(scheduled: ScheduledModel, prompt: Prompt) -> Tensor:
    """Return the mean of the normalised embeddings of each row's text tokens, fp32 [B, D]."""
    with torch.no_grad():
        embeds = prompt.embeds
        if embeds is None:
            assert prompt.ids is not None
            known = within_table(scheduled.embedding, prompt.ids, scheduled.tokens)
            embeds = embedded(scheduled.embedding, known)
        text = (prompt.valid & ~prompt.placeholder).to(embeds.device)
        unit = normalize(embeds.float(), dim=-1) * text[:, :, None]
        return unit.sum(dim=1) / text.sum(dim=1)[:, None].clamp(min=1)


def _position_ids(scheduled: ScheduledModel, prompt: Prompt, gone: Tensor) -> Tensor:
    """Return the ids of a prompt without the places that are gone, by the schedule's rule."""
    rule = scheduled.schedule.position_rule
    if rule.renumbers_after_prunes:
        stays = prompt.valid & ~gone
        return (stays.cumsum(dim=1) - 1).clamp(min=0).expand(prompt.position_ids.shape)
    if rule.renumbers_text:  # the rule itself counts the places that stay
        before = gone.cumsum(dim=1)
        return torch.where(prompt.placeholder, prompt.position_ids, prompt.position_ids - before)
    return prompt.position_ids
