"""Compilers for layer bodies: a backend of torch.compile that times and records its compilations."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config
from torch import fx

from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.output_code import output_code

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Graph and example inputs -> compiled function; the signature of a backend of torch.compile."""

# Raised by Dynamo, AOTAutograd and Inductor where the compiler, and not the program, is at fault.
COMPILER_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._inductor.exc.InductorError,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)


def logged_compiler(
    backend: str,
    name: str,
    shapes: Callable[[Sequence[Any]], str],
    log: CompileLog,
    *,
    written: list[str] | None = None,
    memory_budget: float | None = None,
) -> Compiler:
    """Wrap a backend so that each compilation goes to the log.

    Args:
        backend: a name that `torch._dynamo.lookup_backend` knows, e.g. "inductor".
        name: name of what is compiled, for the log.
        shapes: example inputs -> their shapes as text, for the log.
        log: the log.
        written: collects the code that Inductor generates.
        memory_budget: share of the activations that the partitioner keeps for backward, in (0, 1].
    """
    compile_graph: Callable[..., Any] = torch._dynamo.lookup_backend(backend)

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        shown = shapes(inputs)
        log.started(name, shown)
        started = time.perf_counter()
        with _partitioning(memory_budget), output_code() as code:
            compiled: Callable[..., Any] = compile_graph(graph, inputs)
        if written is not None:
            written.extend(code)
        log.finished(name, shown, time.perf_counter() - started)
        return compiled

    return compiler


def _partitioning(memory_budget: float | None) -> AbstractContextManager[None]:
    if memory_budget is None:
        return nullcontext()
    config: Any = torch._functorch.config
    patched: AbstractContextManager[None] = config.patch(activation_memory_budget=memory_budget)
    return patched
