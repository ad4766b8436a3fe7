"""A backend of torch.compile that lowers graphs for an H100 and runs them as they are."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from hidrop_fx.lowering.compile_log import CompileLog
from tests.support.simulated_cuda import install as simulation
from tests.support.simulated_cuda import tensors
from tests.support.sm90 import attention, target

_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")
_HALF = (torch.float16, torch.bfloat16)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_LAUNCH = re.compile(r"^\s*(\w+)\.run\(", re.MULTILINE)
_EXTERN = re.compile(r"(?:= |^\s*)(?:torch\.ops\.(\w+\.\w+\.\w+)|extern_kernels\.(\w+)|(aten\.\w+\.\w+))\(",
                     re.MULTILINE)  # fmt: skip


@dataclass
class Lowered:
    """One graph as Inductor wrote it.

    Attributes:
        name: the body that it belongs to.
        kind: "inference", "forward" or "backward".
        kernels: launches of Triton kernels.
        calls: calls of operators that are left to PyTorch, by name.
        wide: matrix products whose operands were raised to 32 bit.
        code: the wrapper.
    """

    name: str
    kind: str
    kernels: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    wide: list[str] = field(default_factory=list)
    code: str = ""


LOWERED: list[Lowered] = []

_moving = False
_body = "?"


def install() -> None:
    """Put a simulated H100 and its compiler into this process; there is no way back."""
    from torch._inductor.graph import GraphLowering

    simulation.install()
    target.install()
    attention.install(lambda query: query.is_cuda or _moving)
    to_module = GraphLowering.compile_to_module

    def compile_to_module(self: Any) -> Any:
        module = to_module(self)
        with open(module.__file__) as file:
            LOWERED[-1].code = file.read()
        LOWERED[-1].kernels = len(_LAUNCH.findall(LOWERED[-1].code))
        LOWERED[-1].calls = dict(Counter(map("".join, _EXTERN.findall(LOWERED[-1].code))))
        return module

    GraphLowering.compile_to_module = compile_to_module
    started, lookup = CompileLog.started, torch._dynamo.lookup_backend

    def named(log: CompileLog, name: str, shapes: str) -> None:
        global _body
        _body = name
        started(log, name, shapes)

    CompileLog.started = named  # type: ignore[method-assign]
    torch._dynamo.lookup_backend = lambda name: lower if name == "inductor" else lookup(name)


def lower(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Lower a graph for what it tells, and return it as it is.

    Autograd's engine knows no CUDA in a CPU build. So what needs gradients is traced on the CPU; its forward and
    backward are moved to CUDA before they are lowered.
    """
    from torch._inductor.compile_fx import compile_fx

    trained = any(isinstance(v, Tensor) and v.requires_grad for v in inputs)
    moving = torch.is_grad_enabled() and trained
    copied = copy.deepcopy(module)
    try:
        with _traced_on_cpu(copied, module, inputs) if moving else _no_device():
            compile_fx(copied, inputs, inner_compile=_inner)
    except Exception as error:
        target.note_failure(_body, error)
    return module.forward


def _inner(graph: fx.GraphModule, given: Sequence[Any], **options: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner

    kind = "inference" if not _moving else "backward" if options.get("is_backward") else "forward"
    LOWERED.append(Lowered(_body, kind, wide=_wide_products(graph)))
    if not _moving:
        return compile_fx_inner(graph, given, **options)
    _move(graph, given, _CUDA)
    try:
        with _real_devices(False):
            return compile_fx_inner(graph, given, **options)
    finally:
        _move(graph, given, _CPU)


def _wide_products(graph: fx.GraphModule) -> list[str]:
    """Return the products of matrices that are 32 bit wide though the graph's own inputs are of 16."""
    floats = [v.dtype for n in graph.graph.nodes if n.op == "placeholder"
              for v in [n.meta.get("val")] if isinstance(v, Tensor) and v.is_floating_point()]  # fmt: skip
    if not any(dtype in _HALF for dtype in floats):
        return []
    found = []
    for node in graph.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet is not None and packet.__name__ in _PRODUCTS:
            value = node.args[-1].meta["val"]
            if value.dtype not in _HALF:
                found.append(f"{packet.__name__} {value.dtype} {tuple(node.meta['val'].shape)}")
    return found


@contextmanager
def _no_device() -> Iterator[None]:
    yield


@contextmanager
def _traced_on_cpu(*given: Any) -> Iterator[None]:
    """Move fake values of a graph and of its inputs to the CPU, and tell of no labels, for the block."""
    global _moving
    copied, module, inputs = given
    _move(copied, inputs, _CPU)
    _move(module, inputs, _CPU)  # AOTAutograd finds fake inputs by the real ones
    _moving = True
    try:
        with _real_devices(True):
            yield
    finally:
        _move(module, inputs, _CUDA)
        _moving = False


@contextmanager
def _real_devices(real: bool) -> Iterator[None]:
    with tensors.setting("real_devices", real):
        yield


def _move(graph: fx.GraphModule, given: Sequence[Any], to: torch.device) -> None:
    other = _CPU if to == _CUDA else _CUDA

    def swapped(value: Any) -> Any:
        return to if isinstance(value, torch.device) and value == other else value

    def values() -> Iterator[Any]:
        for node in graph.graph.nodes:
            for key in ("val", "example_value", "original_aten_val"):
                yield from tree_leaves(node.meta.get(key))
        yield from given

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, swapped)
        node.kwargs = fx.node.map_aggregate(node.kwargs, swapped)
    for value in values():
        if isinstance(value, FakeTensor) and value.fake_device == other:
            value.fake_device = to
