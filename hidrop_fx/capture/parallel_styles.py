"""How transformers' tensor parallelism runs a module: by an instance attribute `forward` over its own.

style = style_of(module)         # None, or its class, its mesh, the module's own forward
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hidrop_fx.errors import HidropError

_HOME = "transformers.distributed.tensor_parallel"
_FORWARD = "install_forward.<locals>.tp_forward"
REPLICATED = "ReplicatedWithGradAllReduce"
"""Of norms of heads: whole parameters, whose gradient is a sum over processes."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How transformers runs one module of a plan."""

    name: str
    """Class of the style."""
    style: Any
    """The style; None for `REPLICATED`."""
    mesh: Any
    original: Callable[..., Any]
    """The module's own forward."""


def style_of(module: nn.Module) -> Style | None:
    """Return how tensor parallelism runs a module; None where it does not."""
    forward = module.__dict__.get("forward")
    name = str(getattr(forward, "__qualname__", ""))
    if forward is None or not name.endswith(_FORWARD) or forward.__module__ != _HOME:
        return None
    known = _free_variables(forward)
    style, mesh = known.get("self"), known.get("mesh")
    if style is None:
        mesh = _free_variables(known["_all_reduce_grad"])["mesh"]
    kind = name.partition(".")[0] if style is None else type(style).__name__
    return Style(name=kind, style=style, mesh=mesh, original=known["original_forward"])


def _free_variables(function: Any) -> dict[str, Any]:
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def is_divided(module: nn.Module) -> bool:
    """Return True if transformers' tensor parallelism runs a module, or one inside it."""
    return any("forward" in each.__dict__ and style_of(each) for each in module.modules())


def is_part(model: nn.Module, path: str) -> bool:
    """Return True for a parameter of a module that transformers' tensor parallelism runs, by its path."""
    return style_of(model.get_submodule(path.rpartition(".")[0])) is not None


def writes_files(model: nn.Module) -> bool:
    """Return True for the process that writes what is saved: any, or the first of those that divide a model."""
    return not is_divided(model) or torch.distributed.get_rank() == 0


Noted = dict[str, torch.nn.Parameter]
"""Weights of one norm of heads that transformers has put a hook on, by name."""


def noted_hooks(decoder: nn.Module) -> list[Noted]:
    """Return where transformers notes its hooks that sum gradients of norms of heads: empty until it trains uncompiled."""
    return [
        _free_variables(module.__dict__["forward"])["is_already_hooked"]
        for module in decoder.modules()
        if getattr(style_of(module), "name", None) == REPLICATED
    ]


def release_hooks(noted: Noted) -> None:
    """Take those hooks away: a captured graph sums these gradients itself, and a second time would double them.

    transformers puts them back when it trains the model again.
    """
    for name, parameter in list(noted.items()):
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        for key, hook in list(hooks.items()):
            if str(getattr(hook, "__qualname__", "")).startswith(REPLICATED):
                del hooks[key]
        del noted[name]


def check_undivided(model: nn.Module, what: str) -> None:
    """Raise for what runs a decoder's layers one by one outside its forward, with the heads of one process.

    Raises:
        HidropError: tensor parallelism divides the model.
    """
    if is_divided(model):
        raise HidropError(
            f"{what} runs layers one by one and reads the attention of all heads, of which tensor parallelism leaves "
            "each process a part; call it in one process, on the whole model"
        )
