"""Find the parts of a text model: its list of layers, its embedding, what its first layer is given, windows."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from hidrop_fx.capture.watched_number import plain_number
from hidrop_fx.errors import CaptureError
from hidrop_fx.ops.masks import CHUNKED

TOKENWISE = ("mlp", "moe")
"""Names in `config.layer_types` of layers that compute each token for itself."""


def layer_list(decoder: Any) -> tuple[str, nn.ModuleList]:
    """Return the list of `decoder`'s layers with its module path, e.g. ("layers", decoder.layers).

    Raises:
        CaptureError: the decoder has no `ModuleList` of `config.num_hidden_layers` modules.
    """
    count = getattr(decoder.config, "num_hidden_layers", None)
    lists = {p: m for p, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    for path, module in lists.items():
        if len(module) == count:
            return path, module
    name = type(decoder).__name__
    if "layers" in lists:
        found = len(lists["layers"])
        run = min(found, count or 0)
        raise CaptureError(
            f"{name} has {found} layers, and its config.num_hidden_layers is {count}: Hugging Face would run the "
            f"first {run}. Say so in both, decoder.layers = decoder.layers[:{run}] and config.num_hidden_layers = "
            f"{run}, and call hidrop.compile(model, schedule) again"
        )
    raise CaptureError(
        f"{name} has no ModuleList of its {count} decoder layers; "
        "hidrop_fx rewrites decoders whose layers are listed in one"
    )


def tokenwise_layers(config: Any) -> frozenset[int]:
    """Return the layers of a text config in which no token sees another: they have an MLP or experts alone."""
    types = getattr(config, "layer_types", None) or ()
    return frozenset(k for k, name in enumerate(types) if name in TOKENWISE)


def text_decoder(model: Any) -> Any:
    """Return the text decoder of a model, without a head of its own where it has one, as that of Llama 4 does."""
    found = model.get_decoder()
    inside = getattr(
        found, "_modules", {}
    )  # asking for an attribute that is not there takes microseconds a call
    return inside["model"] if "lm_head" in inside and "model" in inside else found


def base_of(model: Any) -> Any:
    """Return a model without its head; the model itself where no module of it is that, as in Llama 4."""
    return getattr(model, "model", model)


def embedding_table(decoder: Any) -> Tensor:
    """Return the table [tokens, D] of a decoder's token embedding, or the first parameter of one that has several."""
    embedding = decoder.get_input_embeddings()
    # Not as an attribute where it is one of its own: ZeRO-3 would gather it for the rest of the model's call.
    own: Tensor | None = embedding._parameters.get("weight")
    if own is not None:
        return own
    table: Tensor = (
        embedding.weight if hasattr(embedding, "weight") else next(embedding.parameters())
    )
    return table


def final_norm(decoder: Any) -> nn.Module:
    """Return the module behind the last layer of a decoder, which normalises what it hands on."""
    names = ("norm", "final_layernorm", "embedding_norm", "norm_f")
    found: nn.Module = getattr(decoder, next((n for n in names if hasattr(decoder, n)), names[0]))
    return found


class _ReachedError(Exception):
    """The first layer was called."""


def entering(decoder: Any, embeds: Tensor) -> Tensor:
    """Return what a decoder makes of embeddings [n, D] in front of its first layer, [n, D]."""
    found: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    if not len(embeds):
        return embeds
    hook = layer_list(decoder)[1][0].register_forward_pre_hook(note, with_kwargs=True)
    places = torch.arange(len(embeds), device=embeds.device)[None]
    try:
        decoder.forward(inputs_embeds=embeds[None], position_ids=places, use_cache=False)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0][0]


def window_of(attention: Any, told: int | None) -> int | None:
    """Return the sliding window of a layer's attention, or the size of its chunks.

    Args:
        told: what it hands to its attention function; Qwen2-MoE hands on none, whatever its masks are.
    """
    config = getattr(attention, "config", None)
    index = plain_number(getattr(attention, "layer_idx", None))
    types = getattr(config, "layer_types", None)
    if told is None and types and index is not None:
        sizes = {"sliding_attention": "sliding_window", CHUNKED: "attention_chunk_size"}
        window: int | None = getattr(config, sizes.get(types[index], ""), None)
        return window
    return told


def rotation(decoder: Any, states: Tensor, ids: Tensor, layer: int) -> tuple[Tensor, Tensor] | None:
    """Return cos and sin [B, S, d] that a decoder hands to one layer, for position ids [B, S] or [axes, B, S].

    One table may serve all layers, or each layer type has its own frequencies; one that convolves has none,
    nor has any layer of a decoder without RoPE.
    """
    rope, types = getattr(decoder, "rotary_emb", None), getattr(decoder, "rope_types", None)
    if rope is None:
        return None
    bases = getattr(decoder.config, "layer_rope_theta", None)
    if bases is not None and not bases[layer]:  # Muse: layers without RoPE
        return None
    own = getattr(rope, "layer_types", None)
    if own is not None and decoder.config.layer_types[layer] not in own:
        return None
    if types is not None and types[layer] == "unscaled":
        rope = decoder.rotary_emb_unscaled
    if "layer_type" in inspect.signature(rope.forward).parameters:
        return cast("tuple[Tensor, Tensor]", rope(states, ids, decoder.config.layer_types[layer]))
    return cast("tuple[Tensor, Tensor]", rope(states, ids))
