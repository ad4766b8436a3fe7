"""Hand the graphs of a program to the log: ours, and torch's structured one.

TORCH_TRACE=trace python x.py ; tlparse trace     # an artifact a stage, beside those of torch.compile
TORCH_LOGS="+hidrop_fx.program.tracing" python x.py       # the stages as Python, on stderr
"""

import logging
import os

from torch._logging import trace_structured

from hidrop_fx.program.program import Program

DEBUG_VARIABLE = "HIDROP_DEBUG"
"""Environment variable: a directory that every program is dumped to."""
# Read by torch when it is imported.
_TORCH_TRACE = "TORCH_TRACE"

logger = logging.getLogger("hidrop_fx.program.tracing")


def trace_program(program: Program) -> None:
    """Log every stage of a program; costs nothing where nobody listens."""
    if not os.environ.get(_TORCH_TRACE) and not logger.isEnabledFor(logging.DEBUG):
        return
    for index, stage in enumerate(program.history):
        code = f"# {stage.title}\n{stage.code}"
        logger.debug("%s program, stage %d\n%s", program.kind, index, code)
        name = f"hidrop_{program.kind}_{index:02d}_{stage.name}"
        trace_structured(
            "artifact",
            metadata_fn=lambda name=name: {"name": name, "encoding": "string"},  # type: ignore[misc]
            payload_fn=lambda code=code: code,  # type: ignore[misc]
            expect_trace_id=False,
        )
