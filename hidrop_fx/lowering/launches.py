"""Launches of one call of a program: every operator that is more than a view, before any of them are fused.

    launches(executable)    # Launches(total=1480, bodies={"prefill layer body 1": (8, 41), ...}, ...)

An upper bound of the kernels that a compiler launches, which fuses what is pointwise; a recorded CUDA graph is
one launch. Nothing is computed: the graphs run on the fake tensors that they were traced with.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from hidrop_fx.lowering.checkpointing import Recomputable
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.layer_body import Body
from hidrop_fx.surroundings import neutral_surroundings

# They return a tensor, and launch nothing.
_SILENT = ("_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty")


@dataclass(frozen=True, kw_only=True)
class Launches:
    """Launches of one call of a program.

    Attributes:
        total: of all.
        bodies: by layer body, how often a call runs it and its launches each time.
        layers: of each layer, with the prunes at its input; empty for a program that is lowered whole.
        copies: around a replay of the recorded call: one for each dtype that is copied in, or out.
    """

    total: int
    bodies: dict[str, tuple[int, int]]
    layers: dict[int, int]
    copies: int

    @property
    def between(self) -> int:
        """Launches outside the layers: bookkeeping of tokens, masks, RoPE tables, the last norm."""
        return self.total - sum(self.layers.values())


@neutral_surroundings()
def launches(executable: Executable) -> Launches:
    """Count the launches of one call for sizes above 1: of a size of 1, fewer tensors are copied."""
    given = [n.meta["val"] for n in executable.top.graph.nodes if n.op == "placeholder"]
    fake: Any = given[0].fake_mode
    before, fake.allow_non_fake_inputs = fake.allow_non_fake_inputs, True
    try:
        with fake, _Counting() as count, torch.no_grad():
            run = _Bodies(executable.top, count)
            outputs = run.run(*given)
    finally:
        fake.allow_non_fake_inputs = before
    copied = [spec.dtype for spec in executable.specs if not spec.static]
    copies = len(set(copied)) + len({value.dtype for value in outputs.values()})
    return Launches(total=count.launched, bodies=run.found, layers=run.layers, copies=copies)


class _Counting(TorchDispatchMode):
    """Counts operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launched += _launches(func)
        return func(*args, **(kwargs or {}))


class _Bodies(fx.Interpreter):
    """Runs a top graph, and notes what each layer body launches."""

    def __init__(self, top: fx.GraphModule, count: _Counting) -> None:
        super().__init__(top)
        self._count = count
        self.found: dict[str, tuple[int, int]] = {}
        self.layers: dict[int, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self._count.launched
        result = super().run_node(n)
        # Subgraphs are named by what they do and by the layer that they are, or are before: "score_14".
        layer = str(n.meta.get("subgraph", "")).rpartition("_")[2]
        if layer.isdigit():
            self.layers[int(layer)] = self.layers.get(int(layer), 0) + self._count.launched - before
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        body = _body_of(target)
        if body is None:
            return super().call_function(target, args, kwargs)
        before = self._count.launched
        result = body.module.forward(*args)
        calls, _ = self.found.get(body.name, (0, 0))
        self.found[body.name] = calls + 1, self._count.launched - before
        return result


def _body_of(target: Any) -> Body | None:
    body = target.body if isinstance(target, Recomputable) else target
    return body if isinstance(body, Body) else None


@functools.cache
def _launches(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
        return False
    returns = func._schema.returns
    if not any("Tensor" in str(value.type) for value in returns):
        return False
    is_view = all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not is_view and func._overloadpacket.__name__ not in _SILENT
