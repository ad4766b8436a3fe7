"""The data that the inputs of one call are filled from: a prompt's, or a decode step's."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hidrop_fx.planning.layout import Layout
from hidrop_fx.program.program import Kind
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import Rows
from hidrop_fx.runtime.prompt import Prompt, Rounding
from hidrop_fx.training.ratios import Ratios


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptContext:
    """A prompt of B rows and L columns, laid out and embedded, before any program is chosen for it."""

    kind: Kind
    """"prefill" or "train"."""
    rows: Rows
    """Columns whose hidden states are wanted."""
    states: bool
    """The hidden states between the layers are wanted too."""
    prompt: Prompt
    layout: Layout
    rounding: Rounding
    rounded: bool
    """Lengths are such that a recorded graph may serve them."""
    windows: Mapping[str, int]
    """Sliding window of each captured mask that has one."""
    device: torch.device
    columns: dict[str, Tensor]
    """The layout's inputs by name, on the device."""
    text: Tensor
    """Embeddings [B, T, D] of the text segment, image features aside."""
    features: Tensor | None
    """Image features [tokens, D]; None without images, or where the tower runs beside the decoder."""
    pixels: Tensor | None
    """Images that the tower encodes beside the decoder."""
    ratios: Ratios | None

    @property
    def masks(self) -> tuple[str, ...]:
        """Captured masks that are not plain causal for this length."""
        return tuple(k for k, window in self.windows.items() if self.layout.columns > window)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeContext:
    """Tokens behind a prompt, q a row, which the cache has made room for."""

    cache: HidropCache
    rows: Rows
    """Tokens whose hidden states are wanted."""
    states: bool
    """The hidden states between the layers are wanted too."""
    embeds: Tensor
    """[B, q, D]"""
    valid: Tensor | None
    """bool [B, q]: real tokens; None if all are."""
    before: Tensor
    """Real tokens [B] between the prompt and these."""
    columns: Tensor
    """[B, q]"""
    windows: Mapping[str, int]
    """Sliding window of each captured mask that has one."""
    spans: Mapping[str, int] | None
    """By segment: tokens that the program's KV buffers reach to; None where they end with these tokens."""
