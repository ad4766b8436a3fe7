"""Modules that `compile` is given for a schedule that needs more than the model: a submodule of the model.

    hidrop.compile(model, "twigvlm", modules={"twig": layers})
    model.hidrop_modules.twig             # the same layers
    hidrop.compile(model, "index-preserving", modules={"classifier": classifier})

Optimizers, `.to(device)` and `train()` find them, and the state dict of the model stays that of its class.
"""

import logging
from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import nn

from hidrop_fx.capture.layers import layer_list, text_decoder
from hidrop_fx.capture.placement import home
from hidrop_fx.capture.twin import layer_index, with_layers
from hidrop_fx.errors import HidropError, ScheduleError, UnsupportedModelError
from hidrop_fx.models import family_of
from hidrop_fx.planning.geometry import MODULES
from hidrop_fx.runtime.classifier import check_classifier
from hidrop_fx.schedule.schedule import Schedule

logger = logging.getLogger("hidrop_fx")

KNOWN: dict[str, str] = {
    "twig": "an nn.ModuleList of decoder layers; hidrop_fx.grow_twig(model) makes one of the model's own",
    "classifier": "a trained module that gives one logit for the pixels [n, C, p, p] of each cell that becomes a token",
}
"""Names of modules -> what each is."""


class GivenModules(nn.Module):
    """Modules by name, which no state dict holds."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.register_load_state_dict_post_hook(_none_is_missing)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Return nothing of its own."""
        return {} if destination is None else destination

    def named(self) -> dict[str, nn.Module]:
        """Return the modules by name."""
        return dict(self.named_children())


def _none_is_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if f"{MODULES}." not in f".{k}"]


def given_modules(model: Any) -> dict[str, nn.Module]:
    """Return the modules that a model was compiled with, by name."""
    found = getattr(model, MODULES, None)
    return {} if found is None else found.named()


def checked_modules(model: Any, modules: Any) -> dict[str, nn.Module]:
    """Return the argument `modules` of `compile` as a dictionary.

    Raises:
        HidropError: a name is unknown, or a module is not what its name says, or does not fit the model.
    """
    if modules is None:
        return {}
    if not isinstance(modules, Mapping):
        raise HidropError(
            f"modules={type(modules).__name__}: pass a dictionary, such as modules={{'twig': layers}}"
        )
    for name, module in modules.items():
        if name not in KNOWN:
            known = "; ".join(f"{k!r}, {v}" for k, v in KNOWN.items())
            raise HidropError(f"modules has {name!r}, which no schedule reads; it may have {known}")
        if not isinstance(module, nn.Module):
            raise HidropError(f"modules[{name!r}] is a {type(module).__name__}; pass {KNOWN[name]}")
        if name == "twig":
            check_layers(model, name, module)
    return dict(modules)


def check_needed(model: Any, schedule: Schedule, there: Mapping[str, nn.Module]) -> None:
    """Check that the modules that a schedule reads are there.

    Raises:
        ScheduleError: one is not.
        UnsupportedModelError: the model does between its layers what a branch of them would lack.
    """
    for name in schedule.modules:
        reader = (
            f"before={schedule.before!r}" if name == "classifier" else f"score={schedule.score!r}"
        )
        if name not in there:
            raise ScheduleError(
                f"{reader} reads modules[{name!r}], {KNOWN[name]}; write hidrop.compile(model, schedule, "
                f"modules={{{name!r}: ...}})"
            )
        if name == "classifier":
            check_classifier(model, there[name])
            continue
        _note_place(schedule, there[name])
        if family_of(model).deepstack is not None:
            raise UnsupportedModelError(
                f"score={schedule.score!r} reads a side branch of layers, and {type(model).__name__} adds features of its vision tower "
                "between its own, which the branch would lack; use another score"
            )


def _note_place(schedule: Schedule, layers: Any) -> None:
    """Log a branch that was made for the input of another layer than the one that it scores at."""
    made = layer_index(layers[0])
    for layer in schedule.prune:
        if made not in (None, layer):
            logger.warning(
                "the side branch was made for the input of layer %d, and scores at layer %d: its weights expect the hidden "
                "states of the former",
                made,
                layer,
            )


def check_layers(model: Any, name: str, layers: Any) -> None:
    """Check that decoder layers are of the class and sizes of the model's own, and lie where it lies.

    Raises:
        HidropError: they are not.
    """
    if not isinstance(layers, nn.ModuleList):
        raise HidropError(f"modules[{name!r}] is a {type(layers).__name__}; pass {KNOWN[name]}")
    if not len(layers):
        raise HidropError(f"modules[{name!r}] is empty; pass {KNOWN[name]}")
    own = layer_list(text_decoder(model))[1]
    for index, layer in enumerate(layers):
        place = layer_index(layer)
        like = own[min(index if place is None else place, len(own) - 1)]
        where = f"modules[{name!r}][{index}]"
        if type(layer) is not type(like):
            raise HidropError(
                f"{where} is a {type(layer).__name__}, the model's layers are {type(like).__name__}; pass {KNOWN[name]}"
            )
        _check_sizes(where, layer, like)
        for parameter, value in layer.named_parameters():
            device = _device_of(like, model)
            if value.device != device or value.dtype != _dtype_of(like, parameter, model):
                raise HidropError(
                    f"{where}.{parameter} is {value.dtype} on {value.device}, the model's layers are "
                    f"{_dtype_of(like, parameter, model)} on {device}; call .to({str(device)!r}, model.dtype) on it"
                )


def _check_sizes(where: str, layer: nn.Module, like: nn.Module) -> None:
    others = dict(like.named_modules())
    for path, module in layer.named_modules():
        for attribute, value in vars(module).items():
            other = getattr(others.get(path), attribute, None)
            number = type(value) is int and type(other) is int and attribute != "layer_idx"
            if number and value != other and not attribute.startswith("_"):
                raise HidropError(
                    f"{'.'.join(filter(None, (where, path, attribute)))} is {value}, that of the model's own layer {other}; a branch runs on the "
                    "model's hidden states, with its heads and RoPE: make it with the model's text config, or with "
                    "hidrop_fx.grow_twig(model)"
                )


def _device_of(like: Any, model: Any) -> Any:
    """Return the device on which a layer of the model computes."""
    found = next((p.device for p in like.parameters() if not p.is_meta), None)
    return home(text_decoder(model)) if found is None else found


def _dtype_of(like: nn.Module, parameter: str, model: Any) -> Any:
    try:
        found = like.get_parameter(parameter).dtype
    except AttributeError:  # an adapter's, or quantised there
        found = model.dtype
    return found if found.is_floating_point else model.dtype


class BranchDecoder:
    """A model's decoder with the layers of its side branch, one object as long as neither changes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state: list[Any] = []
        self._twin: Any = None

    def __call__(self) -> Any:
        """Return the decoder.

        Raises:
            HidropError: the side branch is gone.
        """
        decoder, twig = text_decoder(self._model), given_modules(self._model).get("twig")
        if not isinstance(twig, nn.ModuleList):
            raise HidropError(
                f"the model has no side branch, model.{MODULES}.twig: it was never compiled with one, or it was deleted; "
                "compile the model with modules={'twig': ...}"
            )
        state = [decoder, twig, len(twig), *decoder.__dict__.values()]
        state += [*decoder._modules.values(), *decoder.config.__dict__.values()]
        if len(state) != len(self._state) or not all(map(is_, state, self._state)):
            self._state, self._twin = state, with_layers(decoder, twig)
        return self._twin
