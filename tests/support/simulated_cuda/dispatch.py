"""The mode that sees every operator: labels results, follows streams, fills captures, refuses mixtures."""

from __future__ import annotations

import functools
import os
import sys
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.support.simulated_cuda.graphs import GENERATORS, HOST_WAITS, SimulatedGraph
from tests.support.simulated_cuda.storages import (
    LOCAL,
    WAITS,
    WILD,
    MixedDevicesError,
    State,
    as_device,
    current_device,
    device_index,
    is_faking,
    is_plain,
    note,
    state_of,
    storage_key,
)
from tests.support.simulated_cuda.streams import (
    CAPTURES,
    Stream,
    current_stream,
    host_waits_for,
    use,
)

_COPIES = ("copy_", "_to_copy", "set_", "copy")
_BY_INDEX = ("index", "_index", "_unsafe_index")
_NOT_BY_INDEX = ("index_select", "index_copy", "index_copy_", "index_add", "index_fill")
_INDEX_TYPES = (torch.int64, torch.int32, torch.bool, torch.uint8)
_RANDOM = ("rand", "randn", "randint", "normal_", "uniform_", "bernoulli", "bernoulli_", "multinomial",
           "exponential_", "native_dropout", "rand_like", "randn_like", "randperm")  # fmt: skip
_TORCH, _HERE = os.path.dirname(torch.__file__), os.path.dirname(__file__)
_PASSING_ON = (
    os.path.join(_TORCH, "_dynamo", "eval_frame.py"),
    torch.utils._python_dispatch.__file__,
    torch._ops.__file__,
    torch._compile.__file__,
)


class Watch(TorchDispatchMode):
    """Runs every operator of a thread as a GPU would: on a stream of the device of its tensors."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # dynamo compiles nothing under others

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hidden = is_faking() or getattr(LOCAL, "unwatched", False)
        if hidden or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        if not all(is_plain(v) for v in tensors) or any(v.is_meta for v in tensors):
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and as_device(device).type == "meta":
            return func(*args, **kwargs)
        return _run(func, tensors, args, kwargs)


def label(value: Tensor, device: int, text: str = "tensor") -> Tensor:
    """Label the storage of a tensor, if it has no label yet."""
    storage = value.untyped_storage()
    if getattr(storage, "_simulated", None) is None:
        home = current_stream(device) if device >= 0 else None
        storage._simulated = State(device, home, f"{text} {list(value.shape)}")
        if home is not None and home.capture is not None:
            home.capture.own(value)
    return value


def _run(func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
    name = func._overloadpacket.__name__
    moving: torch.device | None = getattr(LOCAL, "target", None)
    labels = [device_index(v) for v in tensors]
    on = _devices(tensors, labels)
    copies = name in _COPIES or moving is not None
    if not copies:
        _refuse_mixture(name, tensors, labels)
    target, wild = _target(name, kwargs, tensors, labels, on, moving)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    device = target if target is not None and target >= 0 else min(on, default=None)
    if device is None:
        return _labelled(func(*args, **kwargs), tensors, target, name)
    here = current_stream(device)
    capture = here.capture if here.capture is not None and here.capture.underway else None
    written = _written(func, args, kwargs)
    if name in _RANDOM:
        GENERATORS[device].check(capture is not None)
    if capture is None:
        _check_reads(func, name, tensors, written, here)
    else:
        _check_capture(capture, func, name, tensors, written, copies, {target, *labels} - {WILD})
    result = _labelled(func(*args, **kwargs), tensors, target, name)
    if wild and isinstance(result, Tensor) and (state := state_of(result)) is not None:
        state.wild = True
    if not _is_view(func) or written:
        _enter(capture, here, name, tensors, written, result)
    if name in HOST_WAITS or (copies and {target, *labels} - {WILD} != on):
        host_waits_for(here.clock)
        WAITS[f"{name if name in HOST_WAITS else 'copy'} at {_caller()}"] += 1
    if capture is not None:
        capture.add(func, args, kwargs, result, written)
    return result


def _devices(tensors: list[Tensor], labels: list[int | None]) -> set[int]:
    on = {i for i in labels if i is not None and i >= 0}
    if len(on) > 1:
        pairs = zip(tensors, labels, strict=True)
        on = {i for v, i in pairs if i is not None and i in on and not _is_wild(v)}
    return on


def _target(
    name: str,
    kwargs: Any,
    tensors: list[Tensor],
    labels: list[int | None],
    on: set[int],
    moving: torch.device | None,
) -> tuple[int | None, bool]:
    """Return the label of an operator's results, and True if they may be on any device."""
    device = kwargs.get("device")
    if moving is not None:
        return (moving.index if moving.type == "cuda" else None), False
    if device is not None and as_device(device).type == "cuda":
        return as_device(device).index, False
    if name == "copy_" and on:
        return labels[0], False
    if on:
        first = labels[0]
        return (first if name in _COPIES and first is not None and first >= 0 else min(on)), False
    if tensors:
        return (WILD if WILD in labels else None), False
    if getattr(LOCAL, "factory", False) or _asked_by_python(name):
        return None, False
    capture = current_stream().capture
    if capture is not None and capture.underway:
        return current_device(), True
    return WILD, False


def _check_capture(
    capture: SimulatedGraph,
    func: Any,
    name: str,
    tensors: list[Tensor],
    written: list[Tensor],
    copies: bool,
    devices: set[int | None],
) -> None:
    capture.refuse(func, tensors, name)
    from_host = any(device_index(v) is None and v.dim() > 0 for v in tensors)
    if (copies and len(devices) > 1) or from_host:
        capture.invalidate("a copy between devices")
        raise RuntimeError(
            "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned."
        )
    for value in written:
        capture.keep(value)


def _check_reads(
    func: Any, name: str, tensors: list[Tensor], written: list[Tensor], here: Stream
) -> None:
    """Raise where an operator reads what a capture made, and note work that a capture misses."""
    thread = threading.get_ident()
    for other in CAPTURES:
        if other.thread is None:
            other.thread = thread
        if other.thread == thread and other.stream.device == here.device:
            note("not captured", f"aten::{name} runs on {here} while {other.stream} is captured")
    if name.endswith("_like") or name.startswith("new_") or _is_view(func):
        return
    for value in tensors:
        state = state_of(value)
        stale = state is not None and state.stale and value.numel()
        if stale and not any(value is other for other in written):
            raise RuntimeError(f"aten::{name} reads {state.text}: {state.stale}")


def _enter(
    capture: SimulatedGraph | None,
    here: Stream,
    name: str,
    tensors: list[Tensor],
    written: list[Tensor],
    result: Any,
) -> None:
    """Enter the uses of storages that an operator made."""
    changed = {storage_key(v) for v in written}
    for key, value in {storage_key(v): v for v in tensors}.items():
        if capture is not None and key not in capture.owned:
            known, before = capture.outside.get(key, (None, False))
            weak = known or value.untyped_storage()._weak_ref()
            capture.outside[key] = (weak, before or key in changed)
        elif (state := state_of(value)) is not None:
            use(state, here, key in changed, f"aten::{name}")
    for value in tree_flatten(result)[0]:
        state = state_of(value) if isinstance(value, Tensor) else None
        if state is not None and state.writer is None:
            state.writer = (here, here.now + 1)
            state.readers[here] = here.now + 1
    here.advance()


def _refuse_mixture(name: str, tensors: list[Tensor], labels: list[int | None]) -> None:
    pairs = list(zip(tensors, labels, strict=True))
    on = {i for v, i in pairs if i is not None and i >= 0 and not _is_wild(v)}
    if not on:
        return
    strangers = [v for v, i in pairs if i is None and v.dim() > 0]
    if name.startswith(_BY_INDEX) and name not in _NOT_BY_INDEX:
        if strangers:
            note("index from the host", f"aten::{name} copies an index from the CPU")
        strangers = [v for v in strangers if v.dtype not in _INDEX_TYPES]
    if strangers or len(on) > 1:
        found = sorted({"cpu" if i is None else f"cuda:{i}" for _, i in pairs if i != WILD})
        raise MixedDevicesError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{', '.join(found)}! (aten::{name} of {[list(v.shape) for v in tensors]})"
        )


def _labelled(result: Any, tensors: list[Tensor], target: int | None, name: str) -> Any:
    if target is None:
        return result
    given = {storage_key(v) for v in tensors}
    for value in tree_flatten(result)[0]:
        if is_plain(value) and not value.is_meta and storage_key(value) not in given:
            label(value, target, name)
    return result


def _is_wild(value: Tensor) -> bool:
    state = state_of(value)
    return state is not None and state.wild


@functools.cache
def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operator writes to."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [v for v in tree_flatten(value)[0] if isinstance(v, Tensor)]
    return found


def _asked_by_python(name: str) -> bool:
    """Return True if Python called a factory by its name; C++ passes on the device of an input."""
    frame: Any = sys._getframe(2)
    while frame is not None and _passes_on(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and name in frame.f_code.co_names


def _passes_on(file: str) -> bool:
    return file in _PASSING_ON or file.startswith(_HERE)


def _caller() -> str:
    """Return the line outside PyTorch that called."""
    frame: Any = sys._getframe(2)
    inside = (_TORCH, _HERE, "<eval_with_key>")
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    code = frame.f_code
    return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}"
