"""Policy for calls that would trigger a compilation or a CUDA-graph capture: the option `on_new_shape`."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from hidrop_fx.errors import InputError

logger = logging.getLogger("hidrop_fx")

OnNewShape = Literal["compile", "eager", "error"]
ON_NEW_SHAPE: tuple[str, ...] = ("compile", "eager", "error")


class ShapePolicy:
    """Policy of one compiled model for shapes that were not warmed up."""

    def __init__(self, policy: str) -> None:
        """Set the policy.

        Args:
            policy: "compile" whenever needed; "eager" to run uncompiled, with one log line for each
                shape; "error" to raise.
        """
        self.policy = policy
        self._said: set[str] = set()
        self._announced = threading.local()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Admit all calls of this thread: `hidrop_fx.warmup` runs in this context."""
        before = self.is_announced
        self._announced.value = True
        try:
            yield
        finally:
            self._announced.value = before

    def admit(self, what: str) -> bool:
        """Return True if a call may compile or capture now.

        Args:
            what: what it would compile or capture, for the log and the error.

        Raises:
            InputError: the policy is "error", and `hidrop_fx.warmup` does not run in this thread.
        """
        if self.policy == "compile" or self.is_announced:
            return True
        if self.policy == "error":
            raise InputError(
                f"{what} was not warmed up, and on_new_shape='error'; name its shape, or give a call "
                "like it, to hidrop_fx.warmup, or compile with on_new_shape='compile' or 'eager'"
            )
        if what not in self._said:
            self._said.add(what)
            logger.info("%s was not warmed up: it runs eagerly (on_new_shape='eager')", what)
        return False

    @property
    def is_announced(self) -> bool:
        """True while `hidrop_fx.warmup` runs in this thread."""
        return getattr(self._announced, "value", False)


COMPILE = ShapePolicy("compile")
