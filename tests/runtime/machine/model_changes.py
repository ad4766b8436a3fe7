"""Changes of a model that people make: each a function of the model that returns the model to go on with.

They are made on the model under test and on a fresh one alike, and must do the same to both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests.runtime.machine.fresh_models import Change, base_of

ADAPTED = r".*language_model.*(q_proj|v_proj|down_proj)"
FIRST, SECOND = "default", "second"


@dataclass(frozen=True)
class Traits:
    """The state of a model that decides which changes can be made of it."""

    adapters: tuple[str, ...] = ()
    active: str | None = None
    merged: bool = False
    disabled: bool = False
    dtype: torch.dtype = torch.float32
    marks: frozenset[str] = frozenset()
    """Names of changes that are in force and can be undone."""


def layers(model: Any) -> Any:
    """Return the decoder layers of a model, plain or of PEFT."""
    return base_of(model).model.language_model.layers


# Adapters.


def _lora(rank: int) -> Any:
    return peft.LoraConfig(r=rank, target_modules=ADAPTED, init_lora_weights=False)


def attach(model: Any) -> Any:
    return peft.get_peft_model(model, _lora(2)).train(model.training)


def add_second(model: Any) -> Any:
    training = model.training
    model.add_adapter(SECOND, _lora(3))
    return model.train(training)


def activate(name: str, model: Any) -> Any:
    model.set_adapter(name)
    return model


def remove_second(model: Any) -> Any:
    model.delete_adapter(SECOND)
    return model


def disable(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def enable(model: Any) -> Any:
    model.base_model.enable_adapter_layers()
    return model


def merge(model: Any) -> Any:
    model.merge_adapter()
    return model


def unmerge(model: Any) -> Any:
    model.unmerge_adapter()
    return model


def merge_and_unload(model: Any) -> Any:
    return model.merge_and_unload().requires_grad_(True)


def unload(model: Any) -> Any:
    return model.unload().requires_grad_(True)


def scale_lora(factor: float, model: Any) -> Any:
    """Scale adapters in place, in a dictionary of each adapted layer, as PEFT's `set_scale` does."""
    for module in model.modules():
        for name in getattr(module, "scaling", ()) if _is_lora(module) else ():
            module.scaling[name] *= factor
    return model


def _is_lora(module: nn.Module) -> bool:
    return isinstance(getattr(module, "scaling", None), dict)


# Numbers and sizes.


def cast(dtype: torch.dtype, model: Any) -> Any:
    return model.to(dtype)


def grow(more: int, model: Any) -> Any:
    base = base_of(model)
    base.resize_token_embeddings(base.config.text_config.vocab_size + more)
    return model


def move(device: str, model: Any) -> Any:
    return model.to(device)


# Modules, attributes and hooks.


def halved(module: nn.Module, args: Any, output: Any) -> Any:
    """Halve what a module returns: a hook."""
    return output * 0.5


def observed(module: nn.Module, args: Any, output: Any) -> None:
    """Change nothing: a hook."""


def doubled_input(module: nn.Module, args: Any) -> Any:
    """Double the first argument: a pre-hook."""
    return args[0] * 2, *args[1:]


def _hook(find: Callable[[Any], nn.Module], hook: Any, before: bool, model: Any) -> Any:
    module = find(model)
    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
    return model


def _unhook(find: Callable[[Any], nn.Module], hook: Any, before: bool, model: Any) -> Any:
    module = find(model)
    hooks = module._forward_pre_hooks if before else module._forward_hooks
    for key in [key for key, found in hooks.items() if found is hook]:
        del hooks[key]
    return model


def _embedding(model: Any) -> nn.Module:
    return base_of(model).get_input_embeddings()


def _head(model: Any) -> nn.Module:
    return base_of(model).lm_head


def _tower(model: Any) -> nn.Module:
    return base_of(model).model.vision_tower.pre_layrnorm


def _projector(model: Any) -> nn.Module:
    return base_of(model).model.multi_modal_projector


def _layer(model: Any) -> nn.Module:
    return layers(model)[1]


def _other_activation(model: Any) -> Any:
    layers(model)[0].mlp.act_fn = nn.ReLU()
    return model


def _own_activation(model: Any) -> Any:
    layers(model)[0].mlp.act_fn = nn.SiLU()
    return model


def _scale_attention(factor: float, model: Any) -> Any:
    layers(model)[0].self_attn.scaling *= factor
    return model


def _half_mlp(self: Any, x: Tensor) -> Tensor:
    return type(self).forward(self, x) * 0.5


def _replace_mlp(model: Any) -> Any:
    mlp = layers(model)[1].mlp
    mlp.forward = MethodType(_half_mlp, mlp)
    return model


def _restore_mlp(model: Any) -> Any:
    del layers(model)[1].mlp.forward
    return model


def _feature_layer(index: int, model: Any) -> Any:
    base_of(model).config.vision_feature_layer = index
    return model


def _frozen(trained: bool, model: Any) -> Any:
    for name in ("q_proj", "o_proj"):
        weight = getattr(layers(model)[1].self_attn, name)
        getattr(weight, "base_layer", weight).weight.requires_grad_(trained)
    return model


def _checkpointed(model: Any) -> Any:
    base_of(model).gradient_checkpointing_enable()
    return model


def _not_checkpointed(model: Any) -> Any:
    base_of(model).gradient_checkpointing_disable()
    return model


def _config(name: str, value: Any, model: Any) -> Any:
    setattr(base_of(model).config, name, value)
    return model


def _hooked(find: Callable[[Any], nn.Module], hook: Any, before: bool) -> tuple[Change, Change]:
    return partial(_hook, find, hook, before), partial(_unhook, find, hook, before)


SWITCHES: dict[str, tuple[Change, Change]] = {
    "hook on the embedding": _hooked(_embedding, halved, False),
    "hook on the head": _hooked(_head, halved, False),
    "pre-hook on the head": _hooked(_head, doubled_input, True),
    "hook on the projector": _hooked(_projector, halved, False),
    "pre-hook in the tower": _hooked(_tower, doubled_input, True),
    "observing hook on a layer": _hooked(_layer, observed, False),
    "observing hook on the model": _hooked(base_of, observed, False),
    "other activation": (_other_activation, _own_activation),
    "other scale of attention": (partial(_scale_attention, 2.0), partial(_scale_attention, 0.5)),
    "other forward of an MLP": (_replace_mlp, _restore_mlp),
    "other feature layer": (partial(_feature_layer, -1), partial(_feature_layer, -2)),
    "frozen weights": (partial(_frozen, False), partial(_frozen, True)),
    "gradient checkpointing": (_checkpointed, _not_checkpointed),
    "hidden states by config": (
        partial(_config, "output_hidden_states", True),
        partial(_config, "output_hidden_states", False),
    ),
}
"""Changes that can be undone: how each is made, and how it is taken back."""
