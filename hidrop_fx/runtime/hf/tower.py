"""The vision tower of a model that runs on a side stream, compiled: its equal layers share what is compiled.

transformers' hooks around a layer's attention break its graph in up to three pieces.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hidrop_fx.lowering.compilers import logged_compiler
from hidrop_fx.runtime.hf.override import Override
from hidrop_fx.runtime.runtime import Runtime

_NAME = "vision layer"


class TowerLayer(Override):
    """`forward` of one layer of the tower, compiled for calls without gradients."""

    def __init__(self, owner: nn.Module, runtime: Runtime, compiler: Callable[..., Any]) -> None:
        super().__init__(owner, "forward", runtime)
        self._compiled = torch.compile(self.original, backend=compiler)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        return self._compiled(*args, **kwargs)


def tower_overrides(runtime: Runtime) -> list[Override]:
    """Return one override for each layer of the tower, if there is a side stream and a compiler."""
    tower = getattr(runtime.model.model, "vision_tower", None)
    if tower is None or runtime.options.backend != "inductor" or not runtime.overlaps_vision:
        return []
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=len, default=())
    # One compiler, so that layers of a class share what it makes.
    compiler = logged_compiler("inductor", _NAME, _shape, runtime.programs.log)
    return [TowerLayer(layer, runtime, compiler) for layer in layers]


def _shape(inputs: Sequence[Any]) -> str:
    """Return the shape of the states [images, tokens, width]."""
    states = next(v for v in inputs if isinstance(v, torch.Tensor) and v.dim() == 3)
    return str(list(states.shape))
