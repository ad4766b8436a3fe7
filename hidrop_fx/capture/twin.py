"""A decoder with other layers in place of its own, sharing everything else with it.

twin = with_layers(decoder, layers)
twin(inputs_embeds=..., position_ids=...)      # the code of its class, over those layers
"""

import copy
from typing import Any

from torch import nn

from hidrop_fx.capture.layers import layer_list


def with_layers(decoder: Any, layers: nn.ModuleList) -> Any:
    """Return a module of the decoder's class that runs `layers`.

    What the class's code looks up by a layer's place (types of attention) is that of the layers' own `layer_idx`.
    """
    path, own = layer_list(decoder)
    twin = owner = shallow_copy(decoder)
    *outer, last = path.split(".")
    for name in outer:
        owner._modules[name] = shallow_copy(owner._modules[name])
        owner = owner._modules[name]
    owner._modules[last] = layers
    twin.__dict__["config"] = _config(decoder.config, layers)
    kinds = getattr(decoder, "rope_types", None)
    if isinstance(kinds, list) and len(kinds) == len(own):
        twin.__dict__["rope_types"] = _by_layer(kinds, layers)
    return twin


def layer_index(layer: nn.Module) -> int | None:
    """Return the place in its decoder that a layer was made for; None if it does not say."""
    found = (getattr(module, "layer_idx", None) for module in layer.modules())
    return next((index for index in found if isinstance(index, int)), None)


def _config(config: Any, layers: nn.ModuleList) -> Any:
    found = copy.copy(config)
    depth = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    # Not by attribute: a config checks one field against others that are still to be set.
    found.__dict__[depth] = len(layers)
    if getattr(config, "layer_types", None):
        found.__dict__["layer_types"] = _by_layer(config.layer_types, layers)
    return found


def _by_layer(values: list[Any], layers: nn.ModuleList) -> list[Any]:
    places = [layer_index(layer) for layer in layers]
    return [values[min(k if at is None else at, len(values) - 1)] for k, at in enumerate(places)]


def shallow_copy(module: Any) -> Any:
    """Return a module of the same class with the same parameters and submodules, which may be replaced in it."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_modules"] = dict(module._modules)
    made.__dict__.pop("forward", None)  # bound to the module it was put on
    return made
