"""Index-Preserving token pruning: a classifier of patches, before the vision tower.

The rule is that of the released code as it was seen to run (github.com/jaeminSon/index-preserving-lightweight-token-pruning,
5314b25; its classifier is patch_classifier/lib/architecture.py): one logit for the pixels of each cell, the merged patches that
become one token; cells above 0 stay, with all their neighbours; the tower sees them alone, at their own places.
"""

from hidrop_fx.methods.published import Fields, register_method
from hidrop_fx.methods.reducers import REDUCERS, Reducer


def _most(tokens: int) -> int:
    return tokens


REDUCERS.add(
    "foreground",
    Reducer(
        name="foreground",
        reduce="hidrop_fx.ops.foreground:with_neighbours",
        keep=_most,
        module="classifier",
    ),
)


@register_method(
    "index-preserving",
    source="Index-Preserving token pruning, arXiv 2509.06415; github.com/jaeminSon/index-preserving-lightweight-token-pruning",
    summary="before the tower: the cells that a trained classifier of pixels takes for foreground, and their neighbours",
)
def index_preserving() -> Fields:
    """Keep the ids of the cells that stay; text goes on behind the largest of them."""
    return {"before": "foreground()", "positions": "gapless"}
