"""A side branch grown from a model's own layers, and the shallow model that it is trained as, and drafts with.

twig  = hidrop.grow_twig(model)                   # copies of layers 2, 3 and 4; the model itself is frozen
draft = hidrop.twig_model(model, twig)            # layers 0 and 1, the branch, the model's norm and head
draft(**inputs, labels=labels).loss.backward()    # the model's own loss: next tokens
hidrop.compile(model, "twigvlm", modules={"twig": twig})
model.generate(**inputs, assistant_model=draft)
"""

import copy
from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import nn

from hidrop_fx.capture.export import configs_of
from hidrop_fx.capture.layers import layer_list, text_decoder
from hidrop_fx.capture.twin import layer_index, shallow_copy, with_layers
from hidrop_fx.errors import HidropError
from hidrop_fx.runtime.given_modules import check_layers, given_modules
from hidrop_fx.runtime.hf.binding import unwrapped
from hidrop_fx.runtime.hf.override import RECORD, is_override
from hidrop_fx.schedule.keeps import checked_int

_PREPARE = "prepare_inputs_for_generation"


def grow_twig(model: Any, layers: int = 3, *, layer: int = 2, freeze: bool = True) -> nn.ModuleList:
    """Copy decoder layers of a model, the `layers` of them from `layer` on, as a side branch at the input of `layer`.

    Args:
        model: a transformers VLM, compiled or not.
        layer: where the branch grows: the filter layer of `twigvlm`.
        freeze: no parameter of the model requires a gradient from now on, as its authors train; those of the branch do.

    Raises:
        HidropError: the model has no such layers.
    """
    target = unwrapped(model)
    count, first = (
        checked_int(layers, "layers", minimum=1),
        checked_int(layer, "layer", minimum=0),
    )
    own = layer_list(text_decoder(target))[1]
    if first + count > len(own):
        raise HidropError(
            f"a branch of layers={count} from layer={first} on needs {first + count} layers, and the model has {len(own)}; "
            f"use layers <= {max(0, len(own) - first)}, or an earlier layer"
        )
    if freeze:
        target.requires_grad_(False)
    return copies_of_layers(target, range(first, first + count))


def copies_of_layers(model: Any, places: Sequence[int]) -> nn.ModuleList:
    """Copy decoder layers, which share their configuration with the originals; floating-point parameters train."""
    own = layer_list(text_decoder(model))[1]
    shared = {id(config): config for config in configs_of(own)}
    twig = nn.ModuleList(copy.deepcopy(own[place], dict(shared)) for place in places)
    for parameter in twig.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twig


def twig_model(model: Any, twig: nn.ModuleList | None = None) -> Any:
    """Return the model whose decoder is a side branch behind the layers before it: of the same class, on the same weights.

    It shares every module with `model`; its own are none. Train it as any model of its class, and give it to `generate`
    as the assistant of `model`. Its norm and head are the model's.

    Args:
        model: a transformers VLM, compiled or not.
        twig: the branch; None for the one that the model was compiled with.

    Raises:
        HidropError: there is no branch, or it is not made of layers that follow each other.
    """
    target = unwrapped(model)
    twig = given_modules(target).get("twig") if twig is None else twig  # type: ignore[assignment]
    if twig is None:
        raise HidropError(
            "this model was compiled without a side branch: pass one, twig=hidrop_fx.grow_twig(model)"
        )
    check_layers(target, "twig", twig)
    places = [layer_index(each) for each in twig]
    first = places[0]
    if first is None or places != [*range(first, first + len(twig))]:
        raise HidropError(
            f"the layers of the branch were made for places {places} in a decoder; its first layer says where it grows, "
            "and the others must follow it: set their layer_idx, or make them with hidrop_fx.grow_twig"
        )
    decoder = text_decoder(target)
    path = next(name for name, module in target.named_modules() if module is decoder)
    own = layer_list(decoder)[1]
    shallow = with_layers(decoder, nn.ModuleList([*own[:first], *twig]))
    made = owner = _without_overrides(target)
    *outer, last = path.split(".")
    for name in outer:
        owner._modules[name] = _without_overrides(owner._modules[name])
        owner = owner._modules[name]
    owner._modules[last] = shallow
    _replace_config(made, decoder.config, shallow.config)
    made.__dict__[_PREPARE] = MethodType(_prepare_inputs, made)
    return made


def _prepare_inputs(draft: Any, *args: Any, **kwargs: Any) -> Any:
    """Prepare the inputs of a forward in `generate`; images go with the prompt, also where the model is an assistant.

    transformers hands an assistant none, since it takes no call of one for the first.
    """
    cache = kwargs.get("past_key_values")
    if cache is None or cache.get_seq_length() == 0:
        kwargs["is_first_iteration"] = True
    return getattr(type(draft), _PREPARE)(draft, *args, **kwargs)


def _without_overrides(module: Any) -> Any:
    made = shallow_copy(module)
    for name, value in list(made.__dict__.items()):
        if name == RECORD or is_override(value):
            del made.__dict__[name]
    return made


def _replace_config(made: Any, before: Any, now: Any) -> None:
    """Let the copies of modules around a decoder hold a configuration with that of the decoder in it."""
    config = made.config
    if config is before:
        new = now
    else:
        new = copy.copy(config)
        for name, value in list(new.__dict__.items()):
            if value is before:
                new.__dict__[name] = now
    owner = made
    while owner is not None:
        if owner.__dict__.get("config") is config:
            owner.__dict__["config"] = new
        owner = owner._modules.get("model")
