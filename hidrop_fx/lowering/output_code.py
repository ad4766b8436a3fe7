"""The code that Inductor writes, kept while something is compiled.

with output_code() as code:
    compiled = compile_fx(graph, inputs)
code      # the generated modules, as text
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.RLock()


@contextmanager
def output_code() -> Iterator[list[str]]:
    """Collect what Inductor generates in this context; nothing where another backend compiles."""
    from torch._inductor.graph import GraphLowering  # takes a while, and only compilation needs it

    found: list[str] = []
    if not hasattr(GraphLowering, "save_output_code"):  # a version of torch without the hook
        yield found
        return
    lowering: Any = GraphLowering
    with _LOCK:
        before = lowering.save_output_code

        def keep(code: str) -> None:
            found.append(code)
            if before is not None:
                before(code)

        lowering.save_output_code = keep
        try:
            yield found
        finally:
            lowering.save_output_code = before
