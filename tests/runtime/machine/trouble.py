"""Interrupts and errors in the middle of a call, wherever they may come from.

with interrupted_in_product(after=40): model(**inputs)      # KeyboardInterrupt at the 40th call of a function
with failing_module(tower, error): model(**inputs)
model.generate(**inputs, streamer=FailingStreamer(error))
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv import layer as kv_layer
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.kv.pool import KVPool

_FOLDERS = tuple(
    str(Path(path).resolve()) for path in (hidrop.__path__[0], Path(hidrop.__path__[0]) / "passes")
)
_CHILD_SECONDS = 120


class Trouble(BaseException):
    """An error of the tests' own, which nothing else raises; no `Exception`, as an interrupt is none."""


@contextmanager
def interrupted_in_product(after: int) -> Iterator[None]:
    """Raise `KeyboardInterrupt` where the product's functions are entered for the `after`th time."""
    entered = 0

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal entered
        if event != "call" or not _is_ours(frame.f_code):
            return
        entered += 1
        if entered == after:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


_OURS: dict[Any, bool] = {}


def _is_ours(code: Any) -> bool:
    known = _OURS.get(code)
    if known is None:
        known = os.path.realpath(code.co_filename).startswith(_FOLDERS)
        _OURS[code] = known
    return known


@contextmanager
def failing_module(module: nn.Module, error: BaseException) -> Iterator[None]:
    """Raise an error when a module is called."""

    def fail(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def failing_backward(parameter: Tensor, error: BaseException) -> Iterator[None]:
    """Raise an error when a gradient reaches a parameter."""

    def fail(_: Tensor) -> None:
        raise error

    handle = parameter.register_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def failing_export(error: BaseException, *, late: bool) -> Iterator[None]:
    """Raise an error before or after torch.export has traced a module."""
    original = torch.export.export

    def export(*args: Any, **kwargs: Any) -> Any:
        if late:
            original(*args, **kwargs)
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", export)
        yield


@contextmanager
def no_memory(error: BaseException, after: int) -> Iterator[None]:
    """Raise an error at the `after`th time that a cache or its pool takes memory, or a buffer grows."""
    asked = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == after:
                raise error
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HidropCache, "allocate", counted(HidropCache.allocate))
        patch.setattr(KVPool, "_buffer", counted(KVPool._buffer))
        patch.setattr(kv_layer, "_grown", counted(kv_layer._grown))
        yield


class FailingStreamer(BaseStreamer):
    """A streamer that raises an error at the `after`th token."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self) -> None:
        pass


class FailingProcessor(LogitsProcessor):
    """A logits processor that raises an error at its `after`th call."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise self.error
        return scores


class FailingCriteria(StoppingCriteria):
    """A stopping criterion that raises an error at its `after`th call."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


def holds_in_child(check: Callable[[], bool]) -> bool:
    """Return True if a forked child finds that `check` holds, within a time."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            status = 0 if check() else 1
        except BaseException:
            status = 2
        finally:
            os._exit(status)
    end = time.monotonic() + _CHILD_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
