"""Whether a decoder is still the one that was captured.

watch = Watch(decoder)
watch.key                       # equal for equal states
watch.unchanged(decoder)        # whether it would be the same now, in a fraction of the time
"""

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str)
# Where PEFT keeps which adapters act, and how strongly.
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")

# Read at every call instead.
_NOT_IN_GRAPH = ("gradient_checkpointing",)

# What a module keeps apart, and changes in place.
_KEPT_APART = ("_modules", "_buffers", "_parameters", "_forward_hooks", "_forward_pre_hooks")


class Watch:
    """A decoder's fingerprint, and enough of its state to see that nothing was touched since.

    Attributes are compared dictionary by dictionary, which Python does by identity first: a prompt
    should not wait for every attribute of four hundred modules to be looked at one by one.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.key = fingerprint(decoder)
        self._decoder = decoder
        modules = list(decoder.modules())
        self._attributes = [(module.__dict__, dict(module.__dict__)) for module in modules]
        kept = [module.__dict__[name] for module in modules for name in _KEPT_APART]
        self._empty = [values for values in kept if not values]
        self._filled = [(values, _identities(values)) for values in kept if values]
        tensors = [v for m in modules for v in (*m._parameters.values(), *m._buffers.values())]
        self._tensors = [(v, v.dtype, v.device) for v in tensors if v is not None]
        self._adapted = [
            (module, _adapter_state(module)) for module in modules if _is_adapted(module)
        ]

    def unchanged(self, decoder: nn.Module) -> bool:
        """Whether this is the same decoder in the same state; False where that is not plain to see."""
        if decoder is not self._decoder:
            return False
        try:
            same = all(values == before for values, before in self._attributes)
        except (RuntimeError, ValueError):  # a tensor attribute gave way to another
            return False
        return (
            same
            and not any(self._empty)
            and all(_identities(values) == before for values, before in self._filled)
            and all(v.dtype == dtype and v.device == device for v, dtype, device in self._tensors)
            and all(_adapter_state(module) == before for module, before in self._adapted)
        )


def fingerprint(decoder: Any) -> Any:
    """What a captured graph depends on: modules, parameters and buffers as objects, and the plain
    values that their code reads (mode, dropout, scale, which adapter is active).
    """
    key: list[Any] = []
    embedding = decoder.get_input_embeddings()
    for module in decoder.modules():
        values = module.__dict__
        key.append(id(module))
        key += [v for k, v in values.items() if type(v) in _PLAIN and k not in _NOT_IN_GRAPH]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                key += (id(tensor), type(tensor), tensor.dtype, tensor.device)
        if (module._forward_hooks or module._forward_pre_hooks) and module is not embedding:
            key += user_hooks(module)
        if _is_adapted(module):
            key += _adapter_state(module)
    return tuple(key)


def user_hooks(module: nn.Module) -> tuple[int, ...]:
    """Hooks that are not transformers' own, by identity."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ours = "transformers.utils.output_capturing"
    return tuple(id(hook) for hook in hooks if getattr(hook, "__module__", "") != ours)


def _is_adapted(module: nn.Module) -> bool:
    return any(name in module.__dict__ for name in _ADAPTER_STATE)


def _adapter_state(module: nn.Module) -> tuple[str, ...]:
    return tuple(repr(module.__dict__.get(name)) for name in _ADAPTER_STATE)


def _identities(values: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, values.values()))
