"""Merges: what the tokens that a prune drops leave in those that stay.

    Schedule(prune={10: 64}, merge="nearest_key")       # each goes into one that stays
    Schedule(prune={10: 64}, merge="recycle")           # the best of them stay as a few tokens more

A merge is a function of the tokens at the filter layer's input, given in `ops/merging.py` or `ops/recycling.py`; without
one, what is dropped is lost, as in HiDrop.
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
    added: Callable[[int], tuple[int, int]] | None = None
    """Of so many tokens that are dropped of a row: how many are merged, and into how many tokens that are added behind the
    last that stays. None: they go into those that stay."""

    @property
    def function(self) -> "Callable[..., Tensor]":
        """The function of hidden states, keys, columns before and after, places and the table of vision columns.

        Where tokens are added: of hidden states, scores, columns, the table, counts and the columns of those that are added.
        """
        module, _, name = self.path.partition(":")
        found: Callable[..., Tensor] = getattr(import_module(module), name)
        return found

    def multiply_adds(self, before: int, after: int, scorer: Scorer, model: Widths) -> int:
        """Count what merging adds to a prune and its layer.

        Products of the keys and sums of the states of `after` tokens by `before`; and the keys of the survivors, which
        are projected again from the merged states. Those of the others too, unless the score reads them. Where tokens
        are added: distances of those that are merged, and their sums.
        """
        if self.added is not None:
            merged, added = self.added(self._dropped(before - after))
            return merged * (merged + added) * model.hidden_size
        key_width = model.num_key_value_heads * model.head_dim
        projected = after if "key" in scorer.needs else before
        return projected * model.hidden_size * key_width + before * after * (
            key_width + model.hidden_size
        )

    def _dropped(self, fewer: int) -> int:
        """Count the tokens that are dropped where so many fewer are left; the most that it may be."""
        assert self.added is not None
        dropped = fewer
        while dropped - self.added(dropped)[1] < fewer:
            dropped += 1
        while dropped + 1 - self.added(dropped + 1)[1] == fewer:
            dropped += 1
        return dropped


def recycled_tokens(dropped: int) -> tuple[int, int]:
    """Count those of the dropped that are recycled, the best 30 % and one, and the clusters that they make, a tenth and one."""
    if dropped == 0:
        return 0, 0
    pool = int(dropped * 0.3) + 1
    return pool, int(pool / 10) + 1


MERGES: Registry[Merge] = Registry("merge", default="nearest_key", remedy=", or leave it out")
MERGES.add(
    "nearest_key",
    Merge(
        name="nearest_key",
        path="hidrop_fx.ops.merging:merge_nearest_key",
        summary="each into the one whose key is nearest by cosine, which becomes the mean of all that it stands for",
    ),
)
MERGES.add(
    "recycle",
    Merge(
        name="recycle",
        path="hidrop_fx.ops.recycling:recycled",
        summary="the best 30 %, clustered by density peaks, into a few tokens behind the last that stays",
        added=recycled_tokens,
    ),
)
