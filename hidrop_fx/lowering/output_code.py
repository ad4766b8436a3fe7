"""Collect the code that Inductor generates.

with output_code() as code:
    compiled = compile_fx(graph, inputs)
code      # source of the generated modules
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.RLock()


@contextmanager
def output_code() -> Iterator[list[str]]:
    """Collect the modules that Inductor generates in this context; none with another backend."""
    from torch._inductor.graph import GraphLowering  # slow to import, and only compilation needs it

    found: list[str] = []
    if not hasattr(GraphLowering, "save_output_code"):  # a torch without the hook
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
