"""Deepstack as Qwen3-VL does it: features of tapped tower layers, added behind the first decoder layers.

    for layer_idx, decoder_layer in enumerate(self.layers):
        hidden_states = decoder_layer(hidden_states)
        if deepstack_visual_embeds is not None and layer_idx in range(len(deepstack_visual_embeds)):
            hidden_states[visual_pos_masks] += deepstack_visual_embeds[layer_idx]

Inferred of every class whose base hands `deepstack_visual_embeds` to a decoder with these lines.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hidrop_fx.capture.layers import base_of, text_decoder
from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.models import forward_code
from hidrop_fx.models.family import Family, TowerAdditions
from hidrop_fx.planning.deepstack import Deepstack

_ARGUMENTS = frozenset({"visual_pos_masks", "deepstack_visual_embeds"})
_BEHIND = (
    "layer_idx in range(len(deepstack_visual_embeds))",
    "layer_idx < len(deepstack_visual_embeds)",
)


def with_deepstack(model: Any, family: Family) -> Family:
    """Return the family with its deepstack, where the class has one that is known.

    Raises:
        UnsupportedModelError: it taps as many tower layers as the decoder has layers.
    """
    if not _adds_behind_layers(model):
        return family
    places = _places(model.config)
    depth = model.config.get_text_config().num_hidden_layers
    if max(places.layers, default=0) >= depth:
        raise UnsupportedModelError(
            f"{type(model).__name__} adds features of {len(places.layers)} tower layers behind its first layers, "
            f"and its decoder has {depth}: none may be added behind the last one, where no layer follows. Use a "
            "decoder with more layers, or fewer deepstack_visual_indexes"
        )
    return replace(
        family,
        deepstack=TowerAdditions(places=_places, features=_features, repeated=_repeated),
        declares=family.declares | _ARGUMENTS,
    )


def _adds_behind_layers(model: Any) -> bool:
    base: Any = type(base_of(model))
    decoder: Any = type(text_decoder(model))
    try:
        handed = set(forward_code.steps_of(base)) >= _ARGUMENTS
        source = inspect.getsource(inspect.unwrap(decoder.forward))
        return handed and any(line in source for line in _BEHIND)
    except (ValueError, OSError, TypeError):
        return False  # which is what `check_steps` says more of


def _places(config: Any) -> Deepstack:
    tapped = len(config.vision_config.deepstack_visual_indexes)
    return Deepstack(layers=tuple(range(1, tapped + 1)))


def _features(config: Any, output: Any) -> Sequence[Sequence[Tensor]]:
    pooled = output.pooler_output
    lengths = [len(entry) for entry in ([pooled] if isinstance(pooled, Tensor) else pooled)]
    # Before transformers 5.23, the features of all entries lie in one piece.
    return [
        layer.split(lengths) if isinstance(layer, Tensor) else layer
        for layer in output.deepstack_features
    ]


def _repeated(config: Any, entries: list[Tensor]) -> Any:
    return [entries for _ in _places(config).layers]
