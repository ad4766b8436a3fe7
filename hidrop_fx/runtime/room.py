"""Room in a prompt for the tokens that prunes add: columns behind each row's last vision token.

    prompt = with_room(scheduled, prompt, lengths, rounding)
    prompt.room.opened(labels, -100)         # [B, L + E], what was given moved to its columns
    prompt.room.closed(hidden)               # [B, L, D] again

An added token so has a column of its own in the order of the prompt, and all that goes by columns holds for it. No column
before it moves, vision tokens least of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hidrop_fx.methods import MERGES
from hidrop_fx.planning.batch_layout import IGNORE, added_room
from hidrop_fx.runtime.prompt import Prompt, Rounding, items_of
from hidrop_fx.runtime.scheduled_model import ScheduledModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Room:
    """Columns that are free in every row, on the host."""

    behind: Tensor
    """int64 [B, 1], the column behind which they lie; -1 where they come first."""
    size: int
    """E"""

    def opened(self, values: Tensor, fill: int | bool = 0) -> Tensor:
        """Move what stands at each column [..., B, L] to [..., B, L + E]."""
        source = self._source(values.shape[-1], values.device).expand(*values.shape[:-1], -1)
        return values.gather(-1, source.clamp(min=0)).masked_fill(source < 0, fill)

    def opened_rows(self, values: Tensor) -> Tensor:
        """Move rows [B, L, D] to [B, L + E, D], zero where nothing stood."""
        source = self._source(values.shape[1], values.device)[:, :, None]
        taken = values.gather(1, source.clamp(min=0).expand(-1, -1, values.shape[2]))
        return taken.masked_fill(source < 0, 0)

    def closed(self, values: Tensor) -> Tensor:
        """Move [B, L + E] or [B, L + E, D] back to the columns as they were given."""
        columns = torch.arange(values.shape[1] - self.size, device=values.device)
        behind = self.behind.to(values.device)
        index = columns + self.size * (columns > behind)
        if values.dim() == 2:
            return values.gather(1, index)
        return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))

    def moved(self, columns: Tensor) -> Tensor:
        """Return where columns [..., B, n], as they were given, are now."""
        return columns + self.size * (columns > self.behind.to(columns.device))

    def given(self, columns: Tensor) -> Tensor:
        """Return columns [B, n] as they were given, of tokens that were."""
        return columns - self.size * (columns > self.behind.to(columns.device))

    def places(self, length: int) -> Tensor:
        """Return which of L + E columns are free, bool [B, L + E]."""
        return self._source(length - self.size, self.behind.device) < 0

    def _source(self, length: int, device: torch.device) -> Tensor:
        """Return the given column of each of L + E; -1 of a free one."""
        behind = self.behind.to(device)
        columns = torch.arange(length + self.size, device=device)
        moved = torch.where(columns > behind + self.size, columns - self.size, -1)
        return torch.where(columns <= behind, columns, moved)


def with_room(
    scheduled: ScheduledModel,
    prompt: Prompt,
    lengths: Sequence[Sequence[int]],
    rounding: Rounding,
) -> Prompt:
    """Return the prompt with as many free columns as the schedule's prunes may add tokens.

    Args:
        lengths: vision tokens of each entry of the features, in order, by kind.
    """
    schedule = scheduled.schedule
    if schedule.merge is None or MERGES[schedule.merge].added is None:
        return prompt
    items, units = items_of(scheduled, prompt, lengths)
    vision = prompt.valid & prompt.placeholder & ~prompt.needed
    counts = vision.sum(dim=1).tolist()
    pruned = [
        schedule.prune_counts(*row) for row in zip(counts, items, units or items, strict=True)
    ]
    size = sum(
        added_room([row[layer].added for row in pruned], rounding.vision)
        for layer in schedule.prune
    )
    columns = torch.arange(vision.shape[1], device="cpu")
    behind = torch.where(vision, columns, -1).amax(dim=1, keepdim=True)
    room = Room(behind=behind, size=size)
    free = room.places(vision.shape[1] + size)
    ids, blocks = prompt.position_ids, prompt.blocks
    last = behind.clamp(min=0)
    of_last = ids.gather(-1, last.expand(*ids.shape[:-1], -1))
    return replace(
        prompt,
        room=room,
        ids=None if prompt.ids is None else room.opened(prompt.ids),
        embeds=None if prompt.embeds is None else room.opened_rows(prompt.embeds),
        placeholder=room.opened(prompt.placeholder, False),
        kinds=tuple(room.opened(places, False) for places in prompt.kinds),
        valid=room.opened(prompt.valid, False),
        position_ids=torch.where(free, of_last, room.opened(ids)),
        members=None
        if prompt.members is None
        else torch.where(free, last, room.opened(room.moved(prompt.members))),
        labels=None if prompt.labels is None else room.opened(prompt.labels, IGNORE),
        blocks=None
        if blocks is None
        else torch.where(free, blocks.gather(1, last), room.opened(blocks, -1)),
    )
