"""Let layers without RoPE that scale their queries by a token's place read it off its position id.

    query = query * (log1p(floor((position + 1) / floor_scale)) * attn_scale + 1)      # Llama 4

Hugging Face counts these places within the layer's own rows. There, a token behind others that a schedule took out
would stand for one of them, and one behind padding for a later one.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Of the layers that run now, one decoder at a time; an attribute of a module would be part of a trace.
_SCALES: dict[nn.Module, Tensor] = {}


def tempered_layers(*modules: nn.Module) -> list[Any]:
    """Return the attentions of modules that scale their queries by a token's place."""
    return [layer for module in modules for layer in module.modules() if _is_tuned(layer)]


@contextmanager
def scaled_by(layers: Sequence[Any], ids: Tensor | None) -> Iterator[None]:
    """Take the scaling out of the own code of attentions; `tempered` does it in its place, by position ids [B, S]."""
    if not layers:
        yield
        return
    try:
        for layer in layers:
            layer.attn_temperature_tuning = False
        if ids is not None:
            note_positions(layers, ids)
        yield
    finally:
        _SCALES.clear()
        for layer in layers:
            layer.attn_temperature_tuning = True


@contextmanager
def temperature_by_position(decoder: Any) -> Iterator[None]:
    """Let the layers of a decoder that is traced scale their queries by the position ids that it is called with."""
    layers = tempered_layers(decoder)
    if not layers:
        yield
        return
    with scaled_by(layers, None):

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            # In front of the layers, where a value of position ids alone is one that passes gather for their tokens.
            note_positions(layers, kwargs["position_ids"])

        hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def note_positions(layers: Iterable[Any], ids: Tensor) -> None:
    """Let `tempered` scale the queries of layers by position ids [B, S]."""
    known: dict[tuple[float, float], Tensor] = {}
    for layer in layers:
        settings = float(layer.floor_scale), float(layer.attn_scale)
        if settings not in known:
            known[settings] = _scale(ids, *settings)
        _SCALES[layer] = known[settings]


def tempered(module: nn.Module, query: Tensor) -> Tensor:
    """Scale the queries [B, H, S, d] of a layer that is tuned by position; others stay as they are."""
    scale = _SCALES.get(module)
    return query if scale is None else (query * scale[:, None]).to(query.dtype)


def _is_tuned(module: Any) -> bool:
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope


def _scale(ids: Tensor, floor: float, scale: float) -> Tensor:
    """Return the scale of each token's query, fp32 [B, S, 1], from its position id."""
    places = ids[:, :, None].float() + 1.0
    return torch.log1p(torch.floor(places / floor)) * scale + 1.0
