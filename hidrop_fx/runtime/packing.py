"""Packed batches: samples end to end in a row, told apart by position ids that start anew, or by `cu_seq_lens_q`.

    packing = packing_of(scheduled, inputs, cached=False)     # None where each row is one sample
    inputs, labels = packing.apart(inputs, labels)            # a row of its own for each sample, padded on the right
    hidden = packing.together(hidden)                         # [S, L, D] -> [B, N, D], as the call was given

transformers finds samples the same way: without a mask and a cache, a new one begins wherever a position id is not one more
than that before it. A program sees rows, as of any padded batch, so that each sample has its own images, budgets, scores
and attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.planning.batch_layout import IGNORE
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.runtime.transfer import to_host

STARTS = "cu_seq_lens_q"
_OF_KEYS = "cu_seq_lens_k"
# Arguments with an entry for each token, beside those that a family names.
_BY_TOKEN = ("input_ids", "inputs_embeds", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """S samples in B rows of N columns; between them there is nothing."""

    rows: int
    """B"""
    columns: int
    """N"""
    starts: Sequence[int]
    """Place of each sample's first token among all B * N, in order; the first column of every row is one."""
    fill: int
    """Token id of padding."""

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        ends = [*self.starts[1:], self.rows * self.columns]
        return [end - start for start, end in zip(self.starts, ends, strict=True)]

    @cached_property
    def places(self) -> Tensor:
        """Place of each sample's tokens among all, B * N at padding: int64 [S, L] on the CPU."""
        columns = torch.arange(max(self.lengths), device="cpu")
        starts, lengths = torch.tensor([self.starts, self.lengths], device="cpu")[:, :, None]
        return (starts + columns).where(columns < lengths, self.rows * self.columns)

    def apart(
        self, inputs: Mapping[str, Any], labels: Tensor | None, names: Sequence[str]
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Return a call's arguments and labels with a row for each sample.

        Args:
            names: of the arguments that have an entry for each token.

        Raises:
            InputError: the labels are not one for each token.
        """
        if labels is not None and labels.shape != (self.rows, self.columns):
            raise InputError(
                f"labels have shape {tuple(labels.shape)}, input_ids {(self.rows, self.columns)}"
            )
        found = {name: value for name, value in inputs.items() if name not in _PACKED_ONLY}
        for name in names:
            if found.get(name) is not None:
                fill = {"input_ids": self.fill, "labels": IGNORE}.get(name, 0)
                found[name] = self.split(found[name], fill)
        found["attention_mask"] = (self.places < self.rows * self.columns).long()
        ids = found.get("position_ids")
        if ids is not None:
            found["position_ids"] = self._position_ids(ids)
        return found, None if labels is None else self.split(labels, IGNORE)

    def split(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """Give each sample a row: [B, N, ...] -> [S, L, ...], `fill` at padding."""
        flat = tensor.flatten(0, 1)
        places = self.places.to(tensor.device)
        rows = flat.index_select(0, places.clamp(max=len(flat) - 1).flatten())
        rows = rows.view(*places.shape, *tensor.shape[2:])
        padding = (places == len(flat)).view(*places.shape, *[1] * (tensor.dim() - 2))
        return rows.masked_fill(padding, fill)

    def together(self, rows: Tensor) -> Tensor:
        """Take the padding out again: [S, L, ...] -> [B, N, ...]."""
        here = (self.places < self.rows * self.columns).flatten().nonzero().flatten()
        flat = rows.flatten(0, 1).index_select(0, here.to(rows.device))
        return flat.view(self.rows, self.columns, *rows.shape[2:])

    def last(self, rows: Tensor) -> Tensor:
        """Take the last sample of each row: [S, ...] -> [B, ...]."""
        of_row = [start // self.columns for start in self.starts]
        last = [k for k, b in enumerate(of_row) if of_row[k + 1 : k + 2] != [b]]
        return rows[torch.tensor(last, device=rows.device)]

    def chosen(self, rows: Tensor, columns: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Take rows [S, T, D] at `columns` [S, T] of the samples together -> [B, T', D] and their columns [B, T'].

        Args:
            columns: on the CPU, those of samples of `length` columns, which is the sentinel.

        Returns:
            Rows in the order of their columns, and the sentinel N behind them where a row has fewer than another.
        """
        real = columns < length
        starts = torch.tensor(self.starts, device="cpu")[:, None]
        flat = (starts + columns)[real]  # ascending: so are samples, and columns within one
        counts = (flat // self.columns).bincount(minlength=self.rows)
        slots = torch.arange(int(counts.max()), device="cpu")
        taken = slots < counts[:, None]
        order = torch.zeros_like(taken, dtype=torch.int64)
        order[taken] = real.flatten().nonzero().flatten()
        found = torch.full_like(order, self.columns)
        found[taken] = flat % self.columns
        index = order.flatten().to(rows.device)
        packed = rows.flatten(0, 1).index_select(0, index).view(*order.shape, rows.shape[2])
        return packed, found.to(rows.device)

    def _position_ids(self, ids: Tensor) -> Tensor:
        if ids.dim() == 2:
            return self.split(ids.expand(self.rows, -1))
        return torch.stack([self.split(axis) for axis in ids.expand(-1, self.rows, -1)])


_PACKED_ONLY = (STARTS, _OF_KEYS, "max_length_q", "max_length_k", "seq_idx")


def packing_of(
    scheduled: ScheduledModel, inputs: Mapping[str, Any], *, cached: bool
) -> Packing | None:
    """Return the samples of a prompt's rows; None where each row is one.

    Args:
        cached: the call fills a cache.

    Raises:
        InputError: they cannot be told apart, or there is a cache, whose rows would hold several.
    """
    starts = inputs.get(STARTS)
    if inputs.get("attention_mask") is not None:
        if starts is not None:
            raise InputError(
                f"{STARTS} came with an attention_mask: a row of one sample has a mask, packed samples have none; leave "
                "one of the two out"
            )
        return None
    tokens = inputs.get("input_ids")
    batch, length = (inputs["inputs_embeds"] if tokens is None else tokens).shape[:2]
    ids = _told(scheduled, inputs.get("position_ids"))
    if ids is None and starts is None:
        return None
    anew = None if ids is None else _anew(ids, batch)
    if starts is not None:
        found = _given(inputs, batch, length)
        _check_ids(anew, found, length)
    else:
        assert anew is not None
        found = anew
    if len(found) == batch:
        return None
    if cached:
        raise InputError(
            f"packed sequences ({len(found)} samples in {batch} rows) came with a cache, whose rows hold one sample each; "
            "pass use_cache=False, or pad them. If they are one sample each, whose position_ids leave some out, pass "
            "an attention_mask of ones"
        )
    fill = next(
        token for token in range(len(scheduled.tokens) + 1) if token not in scheduled.tokens
    )
    return Packing(rows=batch, columns=length, starts=found, fill=fill)


def token_arguments(scheduled: ScheduledModel, inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of a call's arguments that have an entry for each token."""
    family = scheduled.family
    tokens = inputs.get("input_ids")
    shape = (inputs["inputs_embeds"] if tokens is None else tokens).shape[:2]
    names = {*_BY_TOKEN, *family.inputs}
    if family.blocks is not None:
        names.add(family.blocks.argument)
    names -= {"position_ids", *(name for kind in family.modalities for name in kind.inputs)}
    given = {name: inputs.get(name) for name in sorted(names)}
    return [n for n, v in given.items() if isinstance(v, Tensor) and v.shape[:2] == shape]


def check_unpacked(inputs: Mapping[str, Any]) -> None:
    """Check that tokens behind a prompt are not packed.

    Raises:
        InputError: they are.
    """
    if inputs.get(STARTS) is not None:
        raise InputError(
            f"{STARTS} came with a cache that holds a prompt: rows of a cache hold one sample each; leave it out"
        )


def _told(scheduled: ScheduledModel, ids: Tensor | None) -> Tensor | None:
    """Return the position ids that tell samples apart, int64 [B or 1, N] on the CPU; None where there are none.

    On several axes these are the ids of the text alone, which come before the others: ids of images do not count by one.
    """
    axes = scheduled.family.axes
    if ids is None or axes == 1:
        return None if ids is None else to_host([ids])[0]
    if ids.dim() == 3:
        return to_host([ids[0]])[0] if len(ids) == axes + 1 else None
    found = to_host([ids])[0]
    if bool((found.diff(dim=-1) != 1).any()):
        raise InputError(
            f"position_ids of shape {tuple(ids.shape)} start anew within a row, and there is no attention_mask: this class "
            f"reads packed sequences off ids of the text before those of {axes} axes; pass position_ids of shape "
            f"{(axes + 1, *ids.shape)}, or cu_seq_lens_q"
        )
    return None


def _anew(ids: Tensor, batch: int) -> list[int]:
    """Return the places where samples begin: a row's first, and those whose id is not one more than that before."""
    first = torch.ones(len(ids), 1, dtype=torch.bool, device="cpu")
    begins = torch.cat([first, ids.diff(dim=-1) != 1], dim=1).expand(batch, -1)
    places: list[int] = begins.flatten().nonzero().flatten().tolist()
    return places


def _given(inputs: Mapping[str, Any], batch: int, length: int) -> list[int]:
    """Return the starts of samples that `cu_seq_lens_q` gives, those of rows among them."""
    of_keys = inputs.get(_OF_KEYS)
    given = [torch.as_tensor(inputs[STARTS]).flatten()]
    given += [] if of_keys is None else [torch.as_tensor(of_keys).flatten()]
    bounds, *others = (value.tolist() for value in to_host(given))
    if others and others[0] != bounds:
        raise InputError(
            f"{STARTS}={bounds} and {_OF_KEYS}={others[0]} differ; a sample's tokens see those of the same sample"
        )
    ends = bounds[:1] == [0] and bounds[-1:] == [batch * length]
    if not ends or sorted(bounds) != bounds:
        raise InputError(
            f"{STARTS}={bounds} must ascend from 0 to the number of tokens, {batch * length}: the place where each sample "
            "begins, and the end"
        )
    return sorted({*bounds[:-1], *range(0, batch * length, length)} - {batch * length})


def _check_ids(anew: list[int] | None, found: list[int], length: int) -> None:
    within = sorted(set(anew or ()) - set(found))
    if within:
        raise InputError(
            f"position_ids start anew at column {within[0] % length} of row {within[0] // length}, where {STARTS} has no "
            "sample begin; give both the same samples, or leave one out"
        )
