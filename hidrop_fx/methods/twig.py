"""TwigVLM: one prune by the attention of a side branch, a few more layers on the filter layer's input, and an exit."""

from __future__ import annotations

from hidrop_fx.methods.needs import TWIG_LAYERS, Widths
from hidrop_fx.methods.published import Fields, pairs, register_method, required
from hidrop_fx.methods.queries import last_prompt_token
from hidrop_fx.methods.registry import Deferred, register_scorer


def _branch(tokens: int, dropped: int, model: Widths) -> int:
    """Count the layers of the branch on all tokens; of the last one, keys and one row's attention."""
    n, d = tokens, model.hidden_size
    query = model.num_attention_heads * model.head_dim
    key = model.num_key_value_heads * model.head_dim
    layer = 2 * n * d * (query + key) + query * n * (n + 1) + 3 * n * d * model.intermediate_size
    layers = getattr(model, "twig_layers", TWIG_LAYERS)
    return (layers - 1) * layer + n * d * key + d * query + n * query


register_scorer(
    "twig",
    queries=last_prompt_token,
    summary="attention of the last prompt token in the last layer of a side branch, modules={'twig': ...}",
    cost=_branch,
)(
    Deferred(
        "hidrop_fx.ops.attention_scores:twig_attention_scores",
        ("twig_query", "twig_key", "columns", "query_columns", "twig_scale"),
        ("twig_softcap", "twig_sinks"),
    )
)


@register_method(
    "twigvlm",
    source="TwigVLM, ICCV 2025; github.com/MILVLG/twigvlm",
    summary="one prune at `layer` by the attention of a trained side branch, then an exit; `average` tokens a layer",
    trains=True,
)
def twigvlm(*, layer: int = 2, average: int | float = 64, exit: int = 24) -> Fields:
    """Keep as many tokens an image as leave `average` of them a layer, over all layers of the model."""
    required(average=average)
    return {"prune": pairs([layer], [1.0]), "average": average, "exit": exit, "score": "twig"}
