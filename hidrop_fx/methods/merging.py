"""Merges: what the tokens that a prune drops leave in those that stay.

    Schedule(prune={10: 64}, merge="nearest_key")

A merge is a function of the tokens at the filter layer's input, given in `ops/merging.py`; without one, what is dropped is
lost, as in HiDrop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from hidrop_fx.methods.needs import Widths
from hidrop_fx.methods.registry import Registry, Scorer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A rule by which dropped tokens go into tokens that stay."""

    name: str
    path: str
    """"module:function" of the function, imported when a program is built."""
    summary: str

    @property
    def function(self) -> "Callable[..., Tensor]":
        """The function of hidden states, keys, columns before and after, places and the table of vision columns."""
        module, _, name = self.path.partition(":")
        found: Callable[..., Tensor] = getattr(import_module(module), name)
        return found

    def multiply_adds(self, before: int, after: int, scorer: Scorer, model: Widths) -> int:
        """Count what merging adds to a prune and its layer.

        Products of the keys and sums of the states of `after` tokens by `before`; and the keys of the survivors, which
        are projected again from the merged states. Those of the others too, unless the score reads them.
        """
        key_width = model.num_key_value_heads * model.head_dim
        projected = after if "key" in scorer.needs else before
        return projected * model.hidden_size * key_width + before * after * (
            key_width + model.hidden_size
        )


MERGES: Registry[Merge] = Registry("merge", default="nearest_key", remedy=", or leave it out")
MERGES.add(
    "nearest_key",
    Merge(
        name="nearest_key",
        path="hidrop_fx.ops.merging:merge_nearest_key",
        summary="each into the one whose key is nearest by cosine, which becomes the mean of all that it stands for",
    ),
)
