"""Modules that `compile` is given for a schedule that needs more than the model: a submodule of the model.

    hidrop.compile(model, "index-preserving", modules={"classifier": classifier})
    model.hidrop_modules.classifier       # the same module

Optimizers, `.to(device)` and `train()` find them, and the state dict of the model stays that of its class.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.planning.geometry import MODULES
from hidrop_fx.runtime.classifier import check_classifier
from hidrop_fx.schedule.schedule import Schedule

KNOWN: dict[str, str] = {
    "classifier": "a trained module that gives one logit for the pixels [n, C, p, p] of each cell that becomes a token"
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
        HidropError: a name is unknown, or a module is not what its name says.
    """
    if modules is None:
        return {}
    if not isinstance(modules, Mapping):
        raise HidropError(
            f"modules={type(modules).__name__}: pass a dictionary, such as modules={{'classifier': module}}"
        )
    for name, module in modules.items():
        if name not in KNOWN:
            known = "; ".join(f"{k!r}, {v}" for k, v in KNOWN.items())
            raise HidropError(f"modules has {name!r}, which no schedule reads; it may have {known}")
        if not isinstance(module, nn.Module):
            raise HidropError(f"modules[{name!r}] is a {type(module).__name__}; pass {KNOWN[name]}")
    return dict(modules)


def check_needed(model: Any, schedule: Schedule, there: Mapping[str, nn.Module]) -> None:
    """Check that the modules that a schedule reads are there, and fit the model.

    Raises:
        ScheduleError: one is not there, or takes other inputs than it would be given.
    """
    for name in schedule.modules:
        if name not in there:
            raise ScheduleError(
                f"before={schedule.before!r} reads modules[{name!r}], {KNOWN[name]}; write hidrop.compile(model, schedule, "
                f"modules={{{name!r}: ...}})"
            )
        check_classifier(model, there[name])
