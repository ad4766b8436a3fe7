"""The state of a vision tower and its projector that a recorded graph took for granted."""

from collections.abc import Hashable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

# Of the model's config: which of the tower's states are the features.
_CHOICES = ("vision_feature_layer", "vision_feature_select_strategy")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_MODE = itemgetter("training")

# Where PEFT keeps which adapters act, and how strongly.
_ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def _is_users(hook: Any) -> bool:
    """Return False for the hooks by which transformers collects hidden states, made at a tower's first call."""
    return getattr(hook, "__module__", "") != "transformers.utils.output_capturing"


class TowerState:
    """Modes, hooks, adapters, modules and tensors of the modules that encode images, and what the config chooses.

    A prompt waits for this: what all modules have is collected by C.
    """

    def __init__(self, towers: Sequence[nn.Module], config: Any) -> None:
        self._towers = towers
        self._config = config
        self._modules: list[dict[str, Any]] = []
        self._children: list[dict[str, Any]] = []
        self._hooks: list[dict[str, Any]] = []
        self._kept: list[dict[str, Any]] = []
        self._adapted: list[dict[str, Any]] = []
        self._collect()

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers as they are now."""
        self._refresh()
        found = chain.from_iterable(values.values() for values in self._kept)
        return [value for value in found if value is not None]

    @property
    def key(self) -> Hashable:
        """Equal for equal states."""
        self._refresh()
        choices = tuple(repr(getattr(self._config, name, None)) for name in _CHOICES)
        tensors = tuple(map(id, chain.from_iterable(map(dict.values, self._kept))))
        hooks = tuple(
            map(id, filter(_is_users, chain.from_iterable(map(dict.values, self._hooks))))
        )
        adapters = tuple(str(values.get(name)) for values in self._adapted for name in _ADAPTERS)
        modes = tuple(map(_MODE, self._modules))
        return self._known, tensors, modes, hooks, adapters, choices

    def _identities(self) -> tuple[int, ...]:
        return tuple(map(id, chain.from_iterable(map(dict.values, self._children))))

    def _refresh(self) -> None:
        if self._identities() != self._known:
            self._collect()

    def _collect(self) -> None:
        """Look for the modules there are; adapters put others in the place of some."""
        modules = [module for tower in self._towers for module in tower.modules()]
        self._modules = [module.__dict__ for module in modules]
        self._children = [values["_modules"] for values in self._modules if values["_modules"]]
        self._hooks = [values[name] for values in self._modules for name in _HOOKS]
        kept = ("_parameters", "_buffers")
        self._kept = [v[name] for v in self._modules for name in kept if v[name]]
        self._adapted = [v for v in self._modules if any(name in v for name in _ADAPTERS)]
        self._known = self._identities()
