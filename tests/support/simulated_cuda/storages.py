"""Labels of storages: the device that a tensor is on, and who wrote and read it last."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tests.support.simulated_cuda.graphs import SimulatedGraph
    from tests.support.simulated_cuda.streams import Stream

FINDINGS: list[str] = []
"""Hazards that a GPU would let pass: races, memory freed in use, work that a capture misses."""

WAITS: Counter[str] = Counter()
"""Lines where the host waited for the device or copied to or from it, and how often."""

LOCAL = threading.local()
"""Of this thread: the current device and streams, and what the simulation is doing."""

WILD = -1
"""Label of what C++ made "on the device of its input", which it takes for the CPU."""

_PLAIN = (Tensor, nn.Parameter)


class MixedDevicesError(RuntimeError):
    """Tensors of several devices in one operator."""


class State:
    """The label of a storage.

    Attributes:
        home: the stream that it was allocated on.
        writer: the stream that wrote it last, and when on that stream's clock.
        readers: streams that read it since, and when.
        recorded: streams whose work, up to when it is freed, ends before it is reused.
        owner: the capture that allocated it.
        stale: why its contents mean nothing; empty where they do.
        wild: it may be on any device.
    """

    __slots__ = (
        "__weakref__",
        "device",
        "home",
        "owner",
        "readers",
        "recorded",
        "stale",
        "text",
        "wild",
        "writer",
    )

    def __init__(self, device: int, home: Stream | None, text: str) -> None:
        self.device, self.home, self.text = device, home, text
        self.writer: tuple[Stream, int] | None = None
        self.readers: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        self.owner: SimulatedGraph | None = None
        self.stale = ""
        self.wild = False

    def __del__(self) -> None:
        if self.owner is not None or self.home is None or sys.is_finalizing():
            return
        for stream, tick in self.readers.items():
            waited_for = any(other.knows(stream, tick) for other in (self.home, *self.recorded))
            if stream is not self.home and not waited_for:
                note(
                    "freed in use", f"{self.text}, of {self.home}, is still used on {stream}; record_stream is missing"
                )  # fmt: skip


def note(kind: str, message: str) -> None:
    """Add a hazard to the findings, and warn."""
    text = f"{kind}: {message}"
    if text not in FINDINGS:
        FINDINGS.append(text)
        warnings.warn(text, stacklevel=3)


def storage_key(value: Tensor) -> int:
    """Return the identity of a tensor's storage."""
    return value.untyped_storage()._cdata


def state_of(value: Tensor) -> State | None:
    """Return the label of a tensor's storage; None on the CPU."""
    return getattr(value.untyped_storage(), "_simulated", None)


def device_index(value: Tensor) -> int | None:
    """Return a tensor's device; None for the CPU."""
    state = state_of(value)
    return None if state is None else state.device


def is_plain(value: Any) -> bool:
    """Return True for tensors that have a storage of their own."""
    return type(value) in _PLAIN and value.layout is torch.strided


def current_device() -> int:
    """Return this thread's current device."""
    return getattr(LOCAL, "device", 0)


def as_device(device: Any) -> torch.device:
    """Return a device with its index."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", current_device())
    return found


@contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    """Set an attribute of `LOCAL` for the block."""
    before = getattr(LOCAL, name, None)
    setattr(LOCAL, name, value)
    try:
        yield
    finally:
        setattr(LOCAL, name, before)


@contextmanager
def unwatched() -> Iterator[None]:
    """Run operators of the simulation itself."""
    disabled = torch.utils._python_dispatch._disable_current_modes
    with setting("unwatched", True), torch.no_grad(), disabled():
        yield


def is_faking() -> bool:
    """Return True under a mode of fake tensors."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
