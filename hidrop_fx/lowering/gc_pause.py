"""Disable the cyclic GC while tracing and compiling.

with collection_paused():
    captured = capture(decoder)

Tracing allocates hundreds of thousands of objects that live on, and the cyclic GC traverses all of
them again and again: it takes two fifths of the time of a capture and frees next to nothing.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pause:
    """Number of threads that hold the GC disabled, and its state before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._was_enabled = False

    def begin(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._holders += 1

    def end(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._was_enabled:
                gc.enable()


_PAUSE = _Pause()


@contextmanager
def collection_paused() -> Iterator[None]:
    """Disable the cyclic GC; restore its state when the last thread leaves this context."""
    _PAUSE.begin()
    try:
        yield
    finally:
        _PAUSE.end()
