"""Counts of what is made: captures, programs, compilations, recordings, and bodies that run uncompiled.

with counter.expect(captures=1, compiled=2, recorded=0):
    model(**inputs)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.outline import Executable
from hidrop_fx.runtime import captures as captures_module

Expected = int | range | Mapping[str, int]
"""A number, a range of numbers, or a number for each name that is made and for no other."""


@dataclass
class Made:
    """What was made, each as its name and shapes, in order."""

    captures: list[str] = field(default_factory=list)
    """Captured decoders, as "train" or "eval"."""
    programs: list[str] = field(default_factory=list)
    """Programs that were lowered, by kind."""
    compiled: list[str] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
    """Graph entries, by plain calls on a CPU and by CUDA graphs on a GPU."""
    fallbacks: list[str] = field(default_factory=list)
    """Bodies that run uncompiled."""


@contextmanager
def expect(
    *,
    captures: Expected | None = None,
    programs: Expected | None = None,
    compiled: Expected | None = None,
    recorded: Expected | None = None,
    fallbacks: Expected = 0,
) -> Iterator[Made]:
    """Assert how much a block makes, in all models and threads; what is None is not looked at.

    A mapping counts by name: `compiled={"decode program": 1}`. The message of a failed assertion gives the
    expected and the found number, and names all that was made.
    """
    made = Made()
    with _recorded_in(made):
        yield made
    wanted = {
        "captures": captures,
        "programs": programs,
        "compiled": compiled,
        "recorded": recorded,
        "fallbacks": fallbacks,
    }
    wrong = [
        _complaint(kind, number, getattr(made, kind))
        for kind, number in wanted.items()
        if number is not None and not _agrees(number, getattr(made, kind))
    ]
    assert not wrong, "\n".join(wrong)


def names(made: list[str]) -> dict[str, int]:
    """Count by name, without shapes."""
    return dict(Counter(line.partition(" (")[0] for line in made))


def _agrees(expected: Expected, made: list[str]) -> bool:
    if isinstance(expected, Mapping):
        return names(made) == {name: number for name, number in expected.items() if number}
    return len(made) in (expected if isinstance(expected, range) else (expected,))


def _complaint(kind: str, expected: Expected, made: list[str]) -> str:
    if isinstance(expected, range):
        wanted = f"{expected.start} to {expected.stop - 1}"
    else:
        wanted = str(expected)
    found = f"{len(made)}:\n  " + "\n  ".join(made) if made else "none"
    return f"{kind}: expected {wanted}, found {found}"


@contextmanager
def _recorded_in(made: Made) -> Iterator[None]:
    capture, finished, init = captures_module.capture, CompileLog.finished, Executable.__init__

    def captured(decoder: Any, **options: Any) -> Any:
        found = capture(decoder, **options)
        made.captures.append("train" if decoder.training else "eval")
        return found

    def logged(log: CompileLog, name: str, shapes: str, seconds: float) -> None:
        finished(log, name, shapes, seconds)
        (made.recorded if name.endswith(" graph") else made.compiled).append(f"{name} ({shapes})")

    def lowered(executable: Executable, program: Any, *args: Any, **options: Any) -> None:
        init(executable, program, *args, **options)
        made.programs.append(program.kind)

    handler = logging.Handler(logging.WARNING)
    handler.emit = _keep_fallbacks(made)  # type: ignore[method-assign]
    logger = logging.getLogger("hidrop_fx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captures_module, "capture", captured)
        patch.setattr(CompileLog, "finished", logged)
        patch.setattr(Executable, "__init__", lowered)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)


def _keep_fallbacks(made: Made) -> Any:
    def emit(record: logging.LogRecord) -> None:
        if " runs uncompiled: " in (line := record.getMessage()):
            made.fallbacks.append(line)

    return emit
