"""The tensors that a score function may ask for, by the names of its parameters.

    def key_norm(key): ...                       # needs "key" of the filter layer
    def attention(query, key, columns, ...): ... # and "query" of the rows that score

This is a closed list. A need that is not `provided` may be declared, so that a scorer can be written down, but a schedule
that uses it is refused.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

GIVEN: dict[str, str] = {
    "columns": "int64 [B, S], prompt column of each token; the sentinel L for an invalid one",
    "is_vision": "bool [B, S], true for vision tokens",
    "is_real": "bool [B, S], false for invalid tokens",
    "query_columns": "int64 [B, Q], columns of the query rows, -1 for none",
    "scale": "float, factor of the layer's attention logits",
    "previous_scale": "float, likewise of the layer before",
    "cos": "[B, S, d], RoPE's cosines at each token, as the layer reads them",
    "sin": "[B, S, d], its sines",
    "twig_scale": "float, factor of the attention logits of the branch's last layer",
    "previous_cos": "[B, S, d], the cosines as the layer before reads them",
    "previous_sin": "[B, S, d], its sines",
}
"""Parameters that cost nothing -> their contents. B rows, S tokens before the prune, Q query rows."""

OPTIONAL: dict[str, str] = {
    "softcap": "float, bound of the layer's attention logits",
    "sinks": "[H], a logit of each head beside those of the tokens",
    "previous_softcap": "float, bound of the layer before's attention logits",
    "previous_sinks": "[H], the layer before's sinks",
    "twig_softcap": "float, bound of those logits",
    "twig_sinks": "[H], that layer's sinks",
}
"""Parameters with a default of None, given where the layer's softmax has such a thing -> their contents."""


class Widths(Protocol):
    """Sizes of a decoder layer that the cost of a score depends on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


TWIG_LAYERS = 3
"""Layers of a side branch, where nothing says how many it has."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """A tensor of the model that a score may read."""

    contents: str
    provided: bool = True
    """False: no pass hands it to a score yet."""
    previous: bool = False
    """It is the layer before's, so that layer must have run on the same tokens."""
    module: str | None = None
    """Name of the module, among those given to `compile`, that makes it."""


NEEDS: dict[str, Need] = {
    "query": Need(contents="[B, H, Q, d], the filter layer's queries of the query rows, rotated"),
    "key": Need(contents="[B, G, S, d], the filter layer's keys, rotated"),
    "value": Need(contents="[B, G, S, d], the filter layer's values"),
    "hidden": Need(contents="[B, S, D], hidden states at the filter layer's input"),
    "previous_hidden": Need(
        contents="[B, S, D], hidden states at the input of the layer before", previous=True
    ),
    "previous_query": Need(
        contents="[B, H, Q, d], the layer before's queries of the query rows, rotated",
        previous=True,
    ),
    "previous_key": Need(contents="[B, G, S, d], the layer before's keys, rotated", previous=True),
    "previous_value": Need(contents="[B, G, S, d], the layer before's values", previous=True),
    "twig_query": Need(
        contents="[B, H, Q, d], queries of the query rows in the last layer of the side branch, rotated",
        module="twig",
    ),
    "twig_key": Need(
        contents="[B, G, S, d], keys of the side branch's last layer, rotated", module="twig"
    ),
    "raters": Need(
        contents="fp32 [B, Q], the share that each query row has in a score: the same for those whose embedding is nearest "
        "to the image's, by their products, and zero for the others"
    ),
    "hidden_after": Need(contents="[B, S, D], hidden states behind the layer", provided=False),
    "features": Need(contents="[B, S, D], outputs of the projector", provided=False),
    "tower_attention": Need(
        contents="[B, S], attention that the vision tower pays to each patch", provided=False
    ),
}


def scoring_cost(needs: Collection[str], tokens: int, dropped: int, model: Widths) -> int:
    """Count the multiply-adds of a score beyond those of the layer on its survivors.

    Keys: those of the dropped tokens, since the survivors' serve the layer too. Queries: one row against
    all keys, its projection shared with the layer's. Values: of all tokens. Of the layer before: keys of all
    tokens and the queries of one row, projected again. Norms and softmax: none; nor the products of embeddings that
    find raters, once a prompt.

    Args:
        tokens: N, scored at the filter layer.
        dropped: those of them that it drops.
    """
    key_width = model.num_key_value_heads * model.head_dim
    cost = 0
    if "key" in needs:
        cost += dropped * model.hidden_size * key_width
    if "query" in needs:
        cost += tokens * model.num_attention_heads * model.head_dim
    if "value" in needs:
        cost += tokens * model.hidden_size * key_width
    query_width = model.num_attention_heads * model.head_dim
    if "previous_key" in needs:
        cost += tokens * model.hidden_size * key_width
    if "previous_value" in needs:
        cost += tokens * model.hidden_size * key_width
    if "previous_query" in needs:
        cost += model.hidden_size * query_width + tokens * query_width
    return cost
