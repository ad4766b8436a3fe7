"""Show what goes on while a model is captured and compiled.

with Progress(lines=True) as progress, watching(model, progress):
    model.generate(**inputs)          # "prefill body 1/2 compiled in 3.2 s"
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hidrop_fx.inspection.report.programs import bodies_of
from hidrop_fx.inspection.timing import warm_up
from hidrop_fx.lowering.compile_log import CompileEntry
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime


class Progress:
    """Messages on stderr: one changing line on a terminal, else a line each, or none."""

    def __init__(self, *, lines: bool) -> None:
        """Show nothing yet.

        Args:
            lines: write plain lines where stderr is no terminal.
        """
        self._lines = lines
        self._status: Any = None

    def __enter__(self) -> "Progress":
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal:
            self._status = console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, text: str) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(text))
        elif self._lines:
            print(text, file=sys.stderr, flush=True)


def compile_ahead(
    model: Any, inputs: Mapping[str, Any], progress: Callable[[str], None], *, decode: bool = True
) -> None:
    """Capture and compile what `generate` needs for these inputs, reporting every compilation.

    Args:
        decode: compile the decode program as well as the prefill.
    """
    progress("capturing the decoder, compiling what the prompt needs")
    with watching(model, progress):
        warm_up(model, inputs, 3 if decode else None)


@contextmanager
def watching(model: Any, progress: Callable[[str], None]) -> Iterator[None]:
    """Show every compilation of a compiled model while the context lasts."""
    runtime = runtime_of(model)
    if runtime is None:
        yield
        return
    before, runtime.programs.log.listener = (
        runtime.programs.log.listener,
        lambda entry: progress(_line(runtime, entry)),
    )
    try:
        yield
    finally:
        runtime.programs.log.listener = before


def _line(runtime: Runtime, entry: CompileEntry) -> str:
    kind = entry.name.split()[0]
    names = [body.name for body in bodies_of(runtime) if body.name.startswith(kind)]
    done = {e.name for e in runtime.programs.log.entries if e.name.startswith(kind)} | {entry.name}
    place = f"{kind} body {len(done)}/{max(len(done), len(names))}"
    if entry.seconds is None:
        return f"compiling {place} ..."
    return f"{place} compiled in {entry.seconds:.1f} s"
