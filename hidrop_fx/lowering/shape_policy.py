"""What is done about a shape for which nothing was compiled or recorded yet."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from hidrop_fx.errors import InputError

logger = logging.getLogger("hidrop_fx")

OnNewShape = Literal["compile", "eager", "error"]
ON_NEW_SHAPE: tuple[str, ...] = ("compile", "eager", "error")


class NewShapes:
    """The policy of one compiled model.

    Args: policy: "compile" whenever needed; run "eager"ly what was not compiled ahead, with one log
        line each; or raise an "error".
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._said: set[str] = set()
        self._announced = threading.local()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Compile whatever comes in this thread: `hidrop_fx.warmup` is at work."""
        before = self.is_announced
        self._announced.value = True
        try:
            yield
        finally:
            self._announced.value = before

    def admit(self, what: str) -> bool:
        """Whether to compile or record something now.

        Raises:
            InputError: the policy is "error".
        """
        if self.policy == "compile" or self.is_announced:
            return True
        if self.policy == "error":
            raise InputError(
                f"{what} was not made ahead, and on_new_shape='error'; name its shape, or give a call "
                "like it, to hidrop_fx.warmup, or compile with on_new_shape='compile' or 'eager'"
            )
        if what not in self._said:
            self._said.add(what)
            logger.info("%s was not made ahead: it runs eagerly (on_new_shape='eager')", what)
        return False

    @property
    def is_announced(self) -> bool:
        """Whether `hidrop_fx.warmup` is at work in this thread."""
        return getattr(self._announced, "value", False)


COMPILE = NewShapes("compile")
