"""The tokens that a KV cache holds: which column each has, which may be seen, which position id comes next.

Layers of one segment are filled alike, so a cached token's column (hence whether it is valid, and how far
away) is kept once a segment for the prompt, and once for all segments for the tokens since, which all
layers see.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.planning.batch_layout import Layout

# Column of a cached token that no query may see.
INVALID = torch.iinfo(torch.int64).max

# Places that are counted ahead of those that a buffer has filled.
_COUNTED = 1024


class TokenLog:
    """Columns and counts of cached tokens, row by row.

    Attributes:
        prompt_length: columns of the prompt, padding and images included.
        generated: tokens since, a row.
        prompt_columns: by segment, the column [B, S] of each token of the prompt; [B, G, n], by KV head, where a layer's
            cache was cut.
        new_columns: the column [B, generated] of each token since, in every segment.
        first_column: column [B] of the first token behind the prompt.
        row_starts: column [B] of the first real token of the prompt.
        first_ids: by segment, position id [B] of that token.
        advanced: real tokens [B] since the prompt.
        ragged: some row has fewer tokens than its segment.
        prompt_mask: bool [B, L], true for the real columns of the prompt.
        padded_right: some row of the prompt may not end with a real token.
        had: vision places [B] that each row has had, by kind.
    """

    def __init__(self) -> None:
        self.prompt_length = 0
        self.generated = 0
        self.prompt_columns: dict[str, Tensor] = {}
        self.new_columns: Tensor = torch.empty(0, 0, device="cpu")
        self.first_column: Tensor = torch.empty(0, device="cpu")
        self.row_starts: Tensor = torch.empty(0, device="cpu")
        self.first_ids: dict[str, Tensor] = {}
        self.advanced: Tensor = torch.empty(0, device="cpu")
        self.ragged = False
        self.prompt_mask: Tensor | None = None
        self.padded_right = True
        self.had: list[Tensor] = []
        self._shown: dict[str, Tensor] = {}
        self._counted: Tensor = torch.empty(0, dtype=torch.int64, device="cpu")

    def clear(self) -> None:
        """Forget all tokens, in place: a shallow copy of a cache has this very log."""
        self.__dict__.update(TokenLog().__dict__)

    @property
    def length(self) -> int:
        """Logical length: columns of the prompt and tokens since."""
        return self.prompt_length + self.generated

    @property
    def columns(self) -> dict[str, Tensor]:
        """By segment: the column [B, filled] of each cached token, or [B, G, filled]; `INVALID` where none may see it."""
        return {name: self.columns_of(name) for name in self.prompt_columns}

    def columns_of(self, segment: str, since: Tensor | None = None) -> Tensor:
        """Return the column of each token that a segment's layers hold, [B, filled], or [B, G, filled] by KV head.

        Args:
            since: columns [B, n] of the places behind the prompt; None for those of the tokens there.
        """
        prompt, since = self.prompt_columns[segment], self.new_columns if since is None else since
        if prompt.dim() == 3:
            since = since[:, None].expand(-1, prompt.shape[1], -1)
        return torch.cat([prompt, since], dim=-1)

    def chunk_starts(self, columns: Tensor, size: int) -> Tensor:
        """Return the first column of the chunk of each column [B, q]; a row's first begins at its first real token."""
        return columns - (columns - self.row_starts[:, None]) % size

    @property
    def next_column(self) -> Tensor:
        """Column of the next token, [B]."""
        return self.first_column + self.advanced

    def next_ids(self, segment: str) -> Tensor:
        """Return the position id of the next token in a segment's layers, [B]."""
        return self.first_ids[segment] + self.advanced

    def places(self, segment: str, tokens: int) -> Tensor:
        """Return the places of the last `tokens` in the buffers of a segment's layers, int64 [tokens]."""
        end = self.prompt_columns[segment].shape[-1] + self.generated
        if end > len(self._counted):
            # No inference tensor: a later call may save it for its backward.
            with torch.inference_mode(mode=False):
                self._counted = torch.arange(end + _COUNTED, device=self.first_column.device)
        # A part of numbers counted once: one operator of the host, and no kernel, for each segment of each step.
        return self._counted.as_strided((tokens,), (1,), end - tokens).data

    def prompt_shown(self, segment: str) -> Tensor:
        """Return which tokens of the prompt may be seen by those behind it: bool [B, 1, 1, S].

        Where KV heads hold different tokens, they hold as many in a row, padding last.
        """
        if segment not in self._shown:
            columns = self.prompt_columns[segment]
            of_any_head = columns[:, 0] if columns.dim() == 3 else columns
            self._shown[segment] = (of_any_head != INVALID)[:, None, None]
        return self._shown[segment]

    def begin(
        self,
        layout: Layout,
        mask: Tensor,
        places: Sequence[Tensor],
        *,
        length: int,
        draft: int,
        device: torch.device,
    ) -> None:
        """Enter a prompt, before its columns are known.

        Args:
            mask: bool [B, L], true for real columns, the draft left out.
            places: bool [B, L] each, of vision tokens, by kind.
            length: columns of prompt and draft, as they were given.
            draft: tokens behind the prompt that can be cropped again.
        """
        self.prompt_mask = mask.to(device)
        self.had = [each.sum(dim=1) for each in places]
        self.padded_right = not bool(mask[:, -1].all())
        self.prompt_length, self.generated = length - draft, draft
        self.ragged = layout.ragged
        self.first_column = torch.tensor(layout.last, device=device) + 1 - draft
        self.row_starts = self.prompt_mask.int().argmax(dim=1)
        tensors = {id(ids): ids for ids in layout.next_ids.values()}
        made = {k: torch.tensor(ids, device=device) - draft for k, ids in tensors.items()}
        self.first_ids = {name: made[id(ids)] for name, ids in layout.next_ids.items()}
        self.advanced = torch.full_like(self.first_column, draft)

    def note_columns(self, columns: Mapping[str, Tensor], sentinel: int) -> None:
        """Enter the columns [B, S] that each segment of the prefill ended up with, and those [B, G, n] of cut caches."""
        for name, values in columns.items():
            known = torch.where(values == sentinel, INVALID, values) if self.ragged else values
            if known.dim() == 3:
                self.prompt_columns[name] = known
                continue
            end = known.shape[1] - self.generated  # a draft is no part of the prompt
            self.prompt_columns[name], self.new_columns = known[:, :end], known[:, end:]

    def shown(self, segment: str) -> Tensor:
        """Return which tokens that a segment's layers hold may be seen, bool [B, filled]."""
        return self.columns_of(segment) != INVALID

    def join(
        self,
        columns: Mapping[str, Tensor],
        layout: Layout,
        real: Tensor,
        places: Sequence[Tensor],
    ) -> None:
        """Make one prompt of all tokens that are there and those of a later turn, which `layers` hold behind them.

        Args:
            columns: by segment, the columns [B, S] that the turn ended up with, counted from its first.
            layout: of the turn.
            real: bool [B, L], its real columns.
            places: bool [B, L] each, of its vision tokens, by kind.
        """
        device = self.first_column.device
        ranks = real.to(device).cumsum(dim=1)
        behind = self.next_column[:, None] + ranks - 1
        table = torch.cat([behind, torch.full_like(behind[:, :1], INVALID)], dim=1)
        past = {name: self.columns_of(name) for name in columns}
        for name, values in columns.items():
            new = table.gather(1, values.to(device))
            self.prompt_columns[name] = torch.cat([past[name], new], dim=1)
        known = self.new_columns != INVALID
        if self.prompt_mask is not None:
            self.prompt_mask = torch.cat([self.prompt_mask, known, real.to(device)], dim=1)
        self.first_column = self.next_column + ranks[:, -1]
        self.prompt_length, self.generated = self.length + real.shape[1], 0
        self.new_columns = self.new_columns[:, :0]
        self.advanced = torch.zeros_like(self.advanced)
        made = {name: torch.tensor(ids, device=device) for name, ids in layout.next_ids.items()}
        self.first_ids = made
        self.ragged |= layout.ragged
        self.padded_right |= not bool(real[:, -1].all())
        self.had = [n + each.sum(dim=1) for n, each in zip(self.had, places, strict=True)]
        self._shown.clear()

    def continues(self, attention_mask: Tensor) -> bool:
        """Return True if a mask [B, past + new], bool, shows what was there before, and all that is new."""
        known = self.continued_mask(attention_mask.shape[1] - self.length)
        return known is not None and torch.equal(attention_mask, known)

    def continued_mask(self, tokens: int) -> Tensor | None:
        """Return the mask [B, past + new], bool, that shows what was there before and new tokens; None if unknown."""
        if self.prompt_mask is None:
            return None
        known = torch.cat([self.prompt_mask, self.new_columns != INVALID], dim=1)
        return torch.nn.functional.pad(known, (0, tokens), value=True)

    def hide(self, attention_mask: Tensor) -> None:
        """Hide tokens generated before that a mask [B, prompt + generated] leaves out, e.g. after an EOS.

        Raises:
            InputError: it shows another prompt than the one that was scored.
        """
        prompt, count = self.prompt_length, self.generated
        if self.prompt_mask is not None and not torch.equal(
            attention_mask[:, :prompt], self.prompt_mask
        ):
            raise InputError(
                "attention_mask hides or shows other prompt columns than when the cache was filled; "
                "vision tokens were chosen for that prompt: pass the whole text without a cache"
            )
        if count == 0:
            return
        known = self.new_columns
        gone = (known != INVALID) & ~attention_mask[:, prompt:]
        if not bool(gone.any()):
            return
        hidden = gone | (known == INVALID)
        self.new_columns = torch.where(hidden, INVALID, known - gone.cumsum(dim=1))
        self.advanced = self.advanced - gone.sum(dim=1)
        self.ragged = True

    def extend(self, valid: Tensor | None, tokens: int) -> Tensor:
        """Enter new tokens of every row and return their columns [B, tokens].

        Args:
            valid: bool [B, tokens], true for real tokens; None if all are.
        """
        columns = self.next_column[:, None]
        if tokens > 1:
            columns = columns + torch.arange(tokens, device=columns.device)
        if valid is not None:
            columns = self.next_column[:, None] + valid.cumsum(dim=1) - 1
            columns = torch.where(valid, columns, INVALID)
            self.ragged |= not bool(valid.all())
            self.padded_right |= not bool(valid[:, -1].all())
        self.new_columns = torch.cat([self.new_columns, columns], dim=1)
        self.advanced = self.advanced + (tokens if valid is None else valid.sum(dim=1))
        self.generated += tokens
        return columns

    def crop(self, count: int) -> None:
        """Forget the last tokens of every row."""
        real = self.new_columns[:, -count:] != INVALID
        self.new_columns = self.new_columns[:, :-count]
        self.advanced = self.advanced - real.sum(dim=1)
        self.generated -= count

    def checkpoint(self) -> Callable[[], None]:
        """Return a function that forgets what is appended or hidden from now on."""
        before = {k: dict(v) if isinstance(v, dict) else v for k, v in self.__dict__.items()}
        return lambda: self.__dict__.update(before)

    def map_rows(self, change: Any) -> None:
        """Replace the rows of every tensor by `change` of them."""
        for rows in (self.prompt_columns, self.first_ids, self._shown):
            rows |= {name: change(values) for name, values in rows.items()}
        self.new_columns = change(self.new_columns)
        self.first_column, self.advanced = change(self.first_column), change(self.advanced)
        self.row_starts = change(self.row_starts)
        self.had = [change(each) for each in self.had]
        if self.prompt_mask is not None:
            self.prompt_mask = change(self.prompt_mask)
