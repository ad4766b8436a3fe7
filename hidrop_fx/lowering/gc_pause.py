"""Leave garbage alone while graphs are made.

with collection_paused():
    captured = capture(decoder)

Tracing makes hundreds of thousands of objects that live on, and Python's cyclic collector walks all
of them again and again: it takes two fifths of the time of a capture and finds next to nothing.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Pause:
    """How many threads want the collector to rest, and whether it ran before the first of them."""

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
    """Hold the cyclic garbage collector back; it goes on as before when the last holder is done."""
    _PAUSE.begin()
    try:
        yield
    finally:
        _PAUSE.end()
