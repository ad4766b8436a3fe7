"""Streams and events as vector clocks: each stream knows how far it has waited for every other one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.support.simulated_cuda.storages import LOCAL, as_device, current_device, note

if TYPE_CHECKING:
    from tests.support.simulated_cuda.graphs import SimulatedGraph
    from tests.support.simulated_cuda.storages import State

GENERATOR_STAYS_CAPTURED = True
"""A capture that fails leaves the default generator in capture mode, as in torch 2.11."""

CAPTURES: list[SimulatedGraph] = []
"""Captures that are under way."""

MADE: list[Stream] = []
"""Streams that were asked for, in order."""


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: dict[Stream, int] = {}
        self.capture: SimulatedGraph | None = None

    def record(self, stream: Stream | None = None) -> Event:
        stream = stream or current_stream()
        self.clock, self.capture = dict(stream.clock), stream.capture
        return self

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        refuse_wait(self.capture, "Event.query")
        return True

    def synchronize(self) -> None:
        refuse_wait(self.capture, "Event.synchronize")
        host_waits_for(self.clock)

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class Stream:
    """torch.cuda.Stream."""

    count = 0

    def __init__(self, device: Any = None, priority: int = 0, default: bool = False, **_: Any):
        self.device = as_device("cuda" if device is None else device)
        self.clock: dict[Stream, int] = {}
        self.capture: SimulatedGraph | None = None
        self.default = default
        if not default:
            Stream.count += 1
            MADE.append(self)
        self.stream_id = self.cuda_stream = 0 if default else Stream.count

    def __repr__(self) -> str:
        return f"stream {self.stream_id} of {self.device}"

    def __enter__(self) -> Stream:
        self._context = StreamContext(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    @property
    def now(self) -> int:
        """Operators that were launched here so far."""
        return self.clock.get(self, 0)

    def advance(self) -> None:
        """Count an operator."""
        self.clock[self] = self.now + 1

    def knows(self, other: Stream, tick: int) -> bool:
        """Return True if this stream, or the host, waited for that."""
        return self.clock.get(other, 0) >= tick or _host().get(other, 0) >= tick

    def record_event(self, event: Event | None = None) -> Event:
        return (event or Event()).record(self)

    def wait_event(self, event: Event) -> None:
        theirs, ours = event.capture, self.capture
        if theirs is not None and theirs.underway and ours is not theirs:
            if self.default:
                theirs.invalidate("the default stream waits for a stream that is captured")
                raise torch.AcceleratorError(
                    "CUDA error: dependency created on uncaptured work (legacy stream)"
                )
            self.capture = theirs
            theirs.forked.append(self)
        elif ours is not None and ours.underway and theirs is None:
            ours.invalidate("a captured stream waits for work outside the capture")
            raise torch.AcceleratorError(
                "CUDA error: dependency created on uncaptured work in another stream"
            )
        for other, tick in event.clock.items():
            self.clock[other] = max(self.clock.get(other, 0), tick)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        refuse_wait(self.capture, "Stream.synchronize")
        host_waits_for(self.clock)

    def query(self) -> bool:
        refuse_wait(self.capture, "Stream.query")
        return True


class StreamContext:
    """torch.cuda.stream(...)."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.device = current_device()
            self.before = current_stream(self.stream.device)
            set_stream(self.stream)

    def __exit__(self, *_: Any) -> None:
        if self.stream is not None:
            set_stream(self.before)
            LOCAL.device = self.device


class DeviceContext:
    """torch.cuda.device(...)."""

    def __init__(self, device: Any) -> None:
        self.index = None if device is None else as_device(device).index

    def __enter__(self) -> None:
        self.before = current_device()
        if self.index is not None and self.index >= 0:
            LOCAL.device = self.index

    def __exit__(self, *_: Any) -> None:
        LOCAL.device = self.before


_defaults: dict[int, Stream] = {}


def default_stream(device: Any = None) -> Stream:
    index = current_device() if device is None else as_device(device).index
    if index not in _defaults:
        _defaults[index] = Stream(index, default=True)
    return _defaults[index]


def current_stream(device: Any = None) -> Stream:
    index = current_device() if device is None else as_device(device).index
    return _streams().get(index) or default_stream(index)


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        _streams()[stream.device.index] = stream
        LOCAL.device = stream.device.index


def synchronize(device: Any = None) -> None:
    for capture in CAPTURES:
        refuse_wait(capture, "torch.cuda.synchronize")
    for stream in (*_defaults.values(), *MADE):
        host_waits_for(stream.clock)


def host_waits_for(clock: dict[Stream, int]) -> None:
    """Note that this thread knows everything up to here to be done."""
    for other, tick in clock.items():
        _host()[other] = max(_host().get(other, 0), tick)


def refuse_wait(capture: SimulatedGraph | None, what: str) -> None:
    """Raise where the host would wait for a stream that is captured."""
    if capture is not None and capture.underway:
        capture.invalidate(what)
        raise torch.AcceleratorError(
            f"CUDA error: operation not permitted when stream is capturing ({what})"
        )


def use(state: State, here: Stream, written: bool, what: str) -> None:
    """Enter that a stream reads or writes a storage, and note a race."""
    if state.device < 0:
        return
    if state.writer is not None and state.writer[0] is not here and not here.knows(*state.writer):
        note(
            "race",
            f"{what} on {here} uses {state.text}, written on {state.writer[0]}, without waiting for it",
        )
    tick = here.now + 1
    if written:
        for reader, at in state.readers.items():
            if reader is not here and not here.knows(reader, at):
                note("race", f"{what} on {here} overwrites {state.text}, still read on {reader}")
        state.writer = (here, tick)
    state.readers[here] = tick


class Generator:
    """The default generator of a device, as far as a failed capture concerns it."""

    def __init__(self) -> None:
        self.captured = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_get_state(self) -> Generator:
        return self

    def graphsafe_set_state(self, state: Generator) -> None:
        self.captured = state.captured

    def check(self, capturing: bool) -> None:
        """Raise as a random operator does whose generator believes that it is captured."""
        if self.captured and not capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


def _host() -> dict[Stream, int]:
    if not hasattr(LOCAL, "host"):
        LOCAL.host = {}
    return LOCAL.host


def _streams() -> dict[int, Stream]:
    if not hasattr(LOCAL, "streams"):
        LOCAL.streams = {}
    return LOCAL.streams
