"""Inputs of a program, declared once by the pass that reads them.

    spec = InputSpec("keep_10", ("batch",), torch.int64, lambda call: call.kept_tokens("prune_10"))
    node = program.add_input(spec)          # a placeholder of these dimensions
    tensor = spec.fill(call)                # what a call puts there

A dimension is a number, or the name of a symbolic size: "batch", "columns" (those of the prompt and the
sentinel behind them), "vision", "queries", "outputs", the name of a segment (its tokens), or a new one.
A program is called with what its specs' `fill` make of the call at hand; nothing else knows their names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hidrop_fx.planning.batch_layout import Layout

__all__ = ["DecodeCall", "InputSpec", "KVBuffers", "KVPart", "Past", "PromptCall"]

KVBuffers = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [B, G, S, d] of each layer."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a cache held before a later turn."""

    buffers: KVBuffers
    shown: Mapping[str, Tensor]
    """By the name of the tokens that a layer caches: which of those there may be seen, bool [B, P]."""


class PromptCall(Protocol):
    """The data that the inputs of a prompt's program (prefill, train) are filled from.

    Tensors may lie on the host: they are moved to the program's device.
    """

    @property
    def layout(self) -> "Layout":
        """The layout of the batch, on the host."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Arguments of the model's forward, as they were given."""

    @property
    def text_columns(self) -> Tensor:
        """int64 [B, T]"""

    @property
    def vision_columns(self) -> Tensor:
        """int64 [B, V]"""

    @property
    def text_embeds(self) -> Tensor:
        """Embeddings [B, T, D] of the text stream."""

    @property
    def vision_embeds(self) -> Tensor | None:
        """Projected features [B, V, D] of the vision stream; None where the tower is still to run."""

    def vision_additions(self, layers: tuple[int, ...]) -> Tensor:
        """Return the sum of what some layers add to each token of the vision stream, [B, V, D]."""

    def additions(self, layer: int) -> Tensor:
        """Return what is added at a layer's input, by column: [B, L + 1, D], zero for words and the sentinel."""

    @property
    def output_columns(self) -> Tensor:
        """Columns of the rows that a program which chooses rows returns, int64 [B, R]."""

    @property
    def blocks(self) -> Tensor | None:
        """The block of each column and the sentinel, whose tokens see each other both ways: int64 [B, L + 1], -1 for none.

        None where no token has one.
        """

    @property
    def rope_parts(self) -> Tensor | None:
        """The part of its axis that each dimension of cos and sin is in, int64 [d], where tokens bear several position ids."""

    @property
    def floors(self) -> Tensor:
        """The first column that each column's token may see, int64 [B, L + 1]; at the sentinel that of tokens behind the prompt."""

    def chunks(self, size: int) -> Tensor:
        """Return the chunk of each column where each is so many columns long, int64 [B, L + 1]."""

    def kept_tokens(self, event: str) -> Tensor:
        """Return the vision tokens that an event leaves of those that were in each row, int64 [B]."""

    def ratio(self, layer: int) -> Tensor:
        """Return the learned share that a filter layer drops, fp32 []."""

    @property
    def buffers(self) -> KVBuffers:
        """The parts of the key and value buffers to be filled."""

    @property
    def past(self) -> Past:
        """What the cache held before, in a later turn."""


class DecodeCall(Protocol):
    """The data that the inputs of a decode program are filled from: new tokens on a filled cache."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Arguments of the model's forward, as they were given."""

    @property
    def embeds(self) -> Tensor:
        """Embeddings [B, q, D] of the new tokens."""

    def position_ids(self, segment: str) -> Tensor:
        """Return their position ids in the layers of a segment, int64 [B, q]."""

    def slots(self, segment: str) -> Tensor:
        """Return their places in the buffers of a segment's layers, int64 [q]."""

    def mask(self, segment: str, window: int | None, chunked: bool = False) -> Tensor:
        """Return the cached tokens that they see in a segment's layers, bool [B, 1, q, S].

        Args:
            window: sliding window of the layers, or the size of their chunks; None for full attention.
        """

    @property
    def real_order(self) -> Tensor:
        """Places of each row's real tokens, in order, then those of its padding, int64 [B, q]."""

    @property
    def real_counts(self) -> Tensor:
        """Real tokens of each row, int64 [B]."""

    @property
    def buffers(self) -> KVBuffers:
        """The filled parts of the key and value buffers."""


@dataclass(frozen=True, slots=True)
class KVPart:
    """What fills an input with a layer's keys or values: the call's part of that buffer, as it lies."""

    entry: int
    """Of the cache."""
    part: Literal[0, 1]
    """0 for keys, 1 for values."""
    layer: int
    """Of the decoder, which the entry belongs to."""

    def __call__(self, call: PromptCall | DecodeCall) -> Tensor:
        """Return the part of the buffer, [B, G, S, d]."""
        return call.buffers[self.entry][self.part]


@dataclass(frozen=True, eq=False)
class InputSpec:
    """One input of a program."""

    name: str
    """The placeholder's name."""
    dims: tuple[str | int, ...]
    """Numbers, and names of symbolic sizes."""
    dtype: torch.dtype
    fill: Callable[[Any], Tensor]
    """Return the tensor for a call: a `PromptCall` in prefill and train, a `DecodeCall` in decode."""
    static: bool = False
    """True for memory that is read and written where it lies, as KV buffers: never copied."""
    updated: bool = False
    """True if what is written there depends on what was read: to run twice is to go on twice."""

    @property
    def declaration(self) -> tuple[Any, ...]:
        """Dimensions, dtype and function, which two declarations of one input share."""
        return self.dims, self.dtype, self.fill, self.static
