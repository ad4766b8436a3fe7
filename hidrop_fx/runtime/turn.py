"""Turns on memory that calls share: one thread at a time, and on CUDA one stream after the other."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Turn:
    """A lock, and the CUDA event behind the work of whoever held it last."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._done: tuple[torch.device, Any] | None = None

    @contextmanager
    def taken(self, device: Callable[[], torch.device | None]) -> Iterator[None]:
        """Hold the lock for the block; the current stream first waits for the turn before.

        Args:
            device: where the block's work runs, asked at its end; None if there was none.
        """
        with self._lock:
            self.wait()
            try:
                yield
            finally:
                self.note(device())

    def wait(self, stream: Any = None) -> None:
        """Let a CUDA stream, by default the current one, wait for the turn before."""
        if self._done is not None:
            device, event = self._done
            (stream or torch.cuda.current_stream(device)).wait_event(event)

    def note(self, device: torch.device | None) -> None:
        """Let the next turn wait for what the current stream of a device was given so far."""
        if device is not None and device.type == "cuda":
            self._done = device, torch.cuda.current_stream(device).record_event()
