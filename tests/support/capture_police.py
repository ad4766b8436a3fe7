"""Operators that a CUDA graph would not bear, noted while recordings are made on a CPU.

    with watching() as found:
        model.generate(**inputs)
    assert not found, found

On a CPU a recording runs its function as a plain call, where anything goes. Noted are, of each operator in it,

* waits of the host for the device (`.item()`, `equal`), and shapes that depend on data (`nonzero`, boolean indexes);
* tensors made from Python's numbers, which would be copied to a GPU;
* reads of memory that is neither a static input, nor a tensor of the program, nor made by the recording itself: a
  replay would read whatever is there by then, as with autocast's cached copies of weights.

The simulated CUDA finds these too, and tensors made on another device; this costs next to nothing.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hidrop_fx.runtime.cuda_graphs import entry, recording

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "bincount", "histc", "argwhere", "allclose",
}  # fmt: skip
_INDEXING = {
    "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put",
}  # fmt: skip
_FROM_PYTHON = {"lift_fresh", "lift_fresh_copy", "lift"}

Storages = dict[int, Any]
"""By identity, and held: an identity is given to another storage once the first is gone."""


class CapturePolice(TorchDispatchMode):
    """A mode that notes what a capture would not bear."""

    def __init__(self, known: Storages, what: str, found: list[str]) -> None:
        super().__init__()
        self.known, self.what, self.found = known, what, found

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # dynamo compiles nothing under others, and layers run uncompiled

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(getattr(func, "_overloadpacket", func), "__name__", str(func))
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        if any(type(value) not in (Tensor, nn.Parameter) or value.is_meta for value in tensors):
            return func(*args, **kwargs)  # a compiler at work
        self._look_at(name, tensors)
        result = func(*args, **kwargs)
        hold(self.known, [v for v in tree_flatten(result)[0] if type(v) is Tensor])
        return result

    def _look_at(self, name: str, tensors: list[Tensor]) -> None:
        if name in WAITS:
            self._note(f"{name}: the host waits for the device")
        if name in _INDEXING and any(v.dtype in (torch.bool, torch.uint8) for v in tensors[1:]):
            self._note(f"{name} by a mask: its shape depends on data")
        if name in _FROM_PYTHON:
            self._note(f"{name}: numbers of Python are copied to the device")
            return
        for value in tensors:
            if value.numel() and value.dim() and _identity(value) not in self.known:
                shown = f"{value.dtype} {list(value.shape)}"
                self._note(f"{name} reads {shown}, which is no static input and not made here")

    def _note(self, text: str) -> None:
        text = f"{self.what}: {text} ({_caller()})"
        if text not in self.found:
            self.found.append(text)


def hold(known: Storages, tensors: list[Tensor]) -> None:
    """Add the storages of tensors to those that a recording may read."""
    for value in tensors:
        known.setdefault(_identity(value), value.untyped_storage())


@contextmanager
def watching() -> Iterator[list[str]]:
    """Note what every recording of the block does that a capture would not bear."""
    found: list[str] = []
    original = recording.Recording.__init__
    made: weakref.WeakKeyDictionary[entry.GraphEntry, Storages] = weakref.WeakKeyDictionary()

    def watched(self: Any, function: Any, captures: Any) -> None:
        owner: Any = getattr(function, "__self__", None)
        if captures is not None or not isinstance(owner, entry.GraphEntry):
            original(self, function, captures)
            return
        backward = function.__name__ == "_backward"
        known = made.pop(owner, {})  # what the forward made, where this is its backward
        quantised = [part for value in owner._quantised for part in entry._parts(value)]
        given = [*owner.inputs.values(), *owner.grad_outputs.values()]
        hold(known, [*given, *owner._plain, *owner._aliases, *quantised])
        with CapturePolice(known, owner.kind + ", backward" * backward, found):
            original(self, function, captures)
        if owner.differentiable and not backward:
            made[owner] = known

    recording.Recording.__init__ = watched  # type: ignore[method-assign]
    try:
        yield found
    finally:
        recording.Recording.__init__ = original  # type: ignore[method-assign]


def _identity(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _caller() -> str:
    """Return the line of the product or the test that called, behind PyTorch's own."""
    frame: Any = sys._getframe(3)
    inside = (torch.__path__[0], __file__, "<eval_with_key>")
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
