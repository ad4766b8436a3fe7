"""Padded batches of the tests as packed ones, and back.

packed = pack(inputs)                      # one row of all samples, no mask; position ids that start anew
logits = apart(output.logits, inputs)      # a list of [n, V], sample by sample
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import IGNORE

BY_TOKEN = ("input_ids", "labels", "inputs_embeds", "mm_token_type_ids", "token_type_ids")


def lengths_of(inputs: Mapping[str, Any]) -> list[int]:
    """Return the real tokens of each row of a padded batch."""
    lengths: list[int] = inputs["attention_mask"].sum(dim=1).tolist()
    return lengths


def starts_of(inputs: Mapping[str, Any]) -> list[int]:
    """Return where each sample begins, and the end."""
    return [0, *torch.tensor(lengths_of(inputs)).cumsum(0).tolist()]


def pack(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Put the samples of a padded batch end to end, as transformers' DataCollatorWithFlattening does."""
    real = inputs["attention_mask"].bool()
    found = {name: value for name, value in inputs.items() if name != "attention_mask"}
    for name in BY_TOKEN:
        if name in found:
            found[name] = found[name][real][None]
    if "labels" in found:
        found["labels"] = found["labels"].clone()
        found["labels"][0, starts_of(inputs)[:-1]] = IGNORE
    counted = [torch.arange(n) for n in lengths_of(inputs)]
    return found | {"position_ids": torch.cat(counted)[None]}


def bounds(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the kernels of flash attention are told of a packed batch."""
    starts = torch.tensor(starts_of(inputs), dtype=torch.int32)
    most = max(lengths_of(inputs))
    return dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=most, max_length_k=most)


def apart(rows: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the rows [n, D] of each sample of a packed batch's [1, N, D]."""
    return list(rows[0].split(lengths_of(inputs)))


def unpadded(rows: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the rows [n, D] of each sample of a padded batch's [B, L, D]."""
    mask = inputs["attention_mask"].bool()
    return [row[real] for row, real in zip(rows, mask, strict=True)]
