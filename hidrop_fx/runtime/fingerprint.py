"""Tell if a decoder is still the one that was captured.

watch = DecoderSnapshot(decoder)
watch.key                       # equal for equal states
watch.unchanged(decoder)        # whether it would be the same now, in a fraction of the time
"""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, str)
# Where PEFT keeps which adapters act, and how strongly.
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")

# Read at every call instead.
_NOT_IN_GRAPH = ("gradient_checkpointing",)

# What a module keeps apart, and changes in place.
_KEPT_APART = ("_modules", "_buffers", "_parameters", "_forward_hooks", "_forward_pre_hooks")

# What a plain module has beside it: hooks of backward and of state dicts, and the like.
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training", *_KEPT_APART}


class DecoderSnapshot:
    """A decoder's fingerprint, and enough of its state to see that nothing was touched since.

    A prompt should not wait for every attribute of four hundred modules to be looked at one by one:
    what cannot matter is left out, and the rest is compared in C, by identity first.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.key = fingerprint(decoder)
        self._decoder = decoder
        modules = list(decoder.modules())
        self._attributes = [_Attributes(module) for module in modules]
        kept = [module.__dict__[name] for module in modules for name in _KEPT_APART]
        self._empty = [values for values in kept if not values]
        self._filled = [values for values in kept if values]
        self._objects = _identities(self._filled)
        tensors = [v for m in modules for v in (*m._parameters.values(), *m._buffers.values())]
        self._tensors = [v for v in tensors if v is not None]
        self._places = _places(self._tensors)
        self._adapted = [
            (module, _adapter_state(module)) for module in modules if _is_adapted(module)
        ]

    def unchanged(self, decoder: nn.Module) -> bool:
        """Return True if this is the same decoder in the same state, and that is plain to see."""
        if decoder is not self._decoder:
            return False
        try:
            same = all([attributes.unchanged() for attributes in self._attributes])
        except (RuntimeError, ValueError):  # a tensor attribute gave way to another
            return False
        return (
            same
            and not any(self._empty)
            and _identities(self._filled) == self._objects
            and _places(self._tensors) == self._places
            and all(_adapter_state(module) == before for module, before in self._adapted)
        )


class _Attributes:
    """The attributes of a module, those aside that every module has for PyTorch's own use."""

    def __init__(self, module: nn.Module) -> None:
        self._live = module.__dict__
        self._count = len(self._live)
        self._get = itemgetter(*(name for name in self._live if name not in _BOOKKEEPING))
        self._values = self._get(self._live)

    def unchanged(self) -> bool:
        live = self._live
        try:
            return len(live) == self._count and bool(self._get(live) == self._values)
        except KeyError:
            return False


class Fingerprint:
    """Parts of one state of a decoder, thousands of them, hashed once."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: Iterable[Any]) -> None:
        self._parts = tuple(parts)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._parts == other._parts


def fingerprint(decoder: Any) -> Fingerprint:
    """Return what a captured graph depends on: modules, parameters and buffers as objects, and the plain
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
    return Fingerprint(key)


def user_hooks(module: nn.Module) -> tuple[int, ...]:
    """Hooks that are not transformers' own, by identity."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ours = "transformers.utils.output_capturing"
    return tuple(id(hook) for hook in hooks if getattr(hook, "__module__", "") != ours)


def _is_adapted(module: nn.Module) -> bool:
    """Return True if a module keeps which adapters act in lists and dictionaries, which change in place."""
    kept = (module.__dict__.get(name) for name in _ADAPTER_STATE)
    return any(value is not None and type(value) not in _PLAIN for value in kept)


def _adapter_state(module: nn.Module) -> tuple[str, ...]:
    return tuple(repr(module.__dict__.get(name)) for name in _ADAPTER_STATE)


def _identities(kept: list[dict[str, Any]]) -> list[int]:
    """Return the identities of all that dictionaries hold, and where each of them ends."""
    return [*map(len, kept), *map(id, chain.from_iterable(map(dict.values, kept)))]


def _places(tensors: list[Tensor]) -> list[Any]:
    return list(map(attrgetter("dtype", "device"), tensors))
