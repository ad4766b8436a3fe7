"""What was compiled, how long it took, and what runs uncompiled."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger("hidrop_fx")


@dataclass(kw_only=True)
class CompileLog:
    """What was compiled so far, for `inspect`, for progress and for tests."""

    entries: list["CompileEntry"] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    listener: Callable[["CompileEntry"], None] | None = None
    """Told of every compilation twice: when it starts, without seconds, and when it is done."""

    @property
    def seconds(self) -> float:
        return sum(entry.seconds or 0.0 for entry in self.entries)

    def started(self, name: str, shapes: str) -> None:
        logger.debug("compiling %s %s", name, shapes)
        self._tell(CompileEntry(name=name, shapes=shapes, seconds=None))

    def finished(self, name: str, shapes: str, seconds: float) -> None:
        logger.info("compiled %s %s in %.1f s", name, shapes, seconds)
        self.entries.append(CompileEntry(name=name, shapes=shapes, seconds=seconds))
        self._tell(self.entries[-1])

    def _tell(self, entry: "CompileEntry") -> None:
        if self.listener is not None:
            self.listener(entry)


@dataclass(frozen=True, kw_only=True)
class CompileEntry:
    """One compilation."""

    name: str
    shapes: str
    """Of the first input, the hidden states; "*" stands for any size above one."""
    seconds: float | None
