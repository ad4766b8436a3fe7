"""Log of compilations: names, shapes and seconds, and the layer bodies that fell back to eager."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger("hidrop_fx")


@dataclass(kw_only=True)
class CompileLog:
    """Compilations of one compiled model, in order; `inspect`, progress and tests read it."""

    entries: list["CompileEntry"] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    """One message for each layer body that runs uncompiled."""
    _noted: bool = False
    listener: Callable[["CompileEntry"], None] | None = None
    """Called twice for every compilation: when it starts, without seconds, and when it ends."""

    @property
    def seconds(self) -> float:
        """Sum over all compilations."""
        return sum(entry.seconds or 0.0 for entry in self.entries)

    def note_dispatch_mode(self) -> None:
        """Log that layer bodies run uncompiled under a dispatch mode, once a model."""
        if not self._noted:
            self._noted = True
            logger.info(
                "a dispatch mode is active (FlopCounterMode, CommDebugMode, a logger, ...): layers run uncompiled "
                "and unrecorded under it, so that it sees every operator"
            )

    def started(self, name: str, shapes: str) -> None:
        """Announce a compilation."""
        logger.debug("compiling %s %s", name, shapes)
        self._notify(CompileEntry(name=name, shapes=shapes, seconds=None))

    def finished(self, name: str, shapes: str, seconds: float) -> None:
        """Record a compilation."""
        logger.info("compiled %s %s in %.1f s", name, shapes, seconds)
        self.entries.append(CompileEntry(name=name, shapes=shapes, seconds=seconds))
        self._notify(self.entries[-1])

    def _notify(self, entry: "CompileEntry") -> None:
        if self.listener is not None:
            self.listener(entry)


@dataclass(frozen=True, kw_only=True)
class CompileEntry:
    """One compilation."""

    name: str
    shapes: str
    """Shape of the first input, the hidden states; "*" stands for any size above one."""
    seconds: float | None
    """None while it runs."""
