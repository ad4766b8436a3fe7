"""A function that equal layers share, compiled at its first call."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.gc_pause import collection_paused
from hidrop_fx.lowering.guard_bypass import GraphCall, Shortcut, shortcut
from hidrop_fx.lowering.output_code import output_code
from hidrop_fx.lowering.shape_policy import COMPILE, NewShapes
from hidrop_fx.program.program import is_symbolic

logger = logging.getLogger("hidrop_fx")

# Lengths that a body remembers compiled code for.
_SHORTCUTS = 64

# What dynamo, AOTAutograd and Inductor raise when they, and not the program, are at fault.
_COMPILER_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._inductor.exc.InductorError,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)

_RECOMPUTE: ContextVar[bool] = ContextVar("recompute", default=False)


class Body:
    """A function that structurally equal subgraphs share, compiled at its first call.

    If the compiler fails, or its limit of variants is reached, the body logs one line and runs
    uncompiled from then on: slower, never wrong.

    Args: new_shapes: whether a call that would compile may.
        bypass_guards: calls without gradients may go straight to the compiled code that served an
        equal one; only for a module whose inputs share no memory where it writes to any.
    """

    def __init__(
        self,
        name: str,
        module: fx.GraphModule,
        backend: str,
        log: CompileLog,
        new_shapes: NewShapes = COMPILE,
        memory_budget: float | None = None,
        bypass_guards: bool = False,
    ) -> None:
        self.name = name
        self.module = module
        self.used_by: list[str] = []
        self.output_code: list[str] = []
        """What Inductor wrote, one module a variant."""
        self._log = log
        self._new_shapes = new_shapes
        self._memory_budget = memory_budget
        self._symbolic = [_symbolic_dims(n) for n in _placeholders(module.graph)]
        self._run: Callable[..., Any] = module.forward
        if backend != "eager":
            compiler = self._recording(backend)
            self._run = torch.compile(
                module.forward, backend=compiler, fullgraph=True, dynamic=False
            )
        self._compiled = backend != "eager"
        self._shapes = ""
        self._variants: set[tuple[bool, ...]] = set()
        self._bypass_guards = bypass_guards
        self._varying = [place for place, dims in enumerate(self._symbolic) if dims]
        self._shortcuts: dict[tuple[torch.Size, ...], Shortcut] = {}
        self._last: GraphCall | None = None

    def __call__(self, *args: Tensor) -> Any:
        if not self._compiled:
            return self._run(*args)
        if self._bypass_guards:
            known = self._shortcuts.get(self._lengths(args))
            if known is not None and known.fits(args):
                return known(args)
        variant = self._variant(args)
        new_kind = variant not in self._variants
        if new_kind and not self._prepare(args, variant):
            return self.module.forward(*args)
        try:
            with collection_paused() if new_kind else nullcontext():
                result = self._run(*args)
        except _COMPILER_ERRORS as error:
            return self._fall_back(error)(*args)
        self._remember(args, result)
        return result

    def _remember(self, args: tuple[Tensor, ...], result: Any) -> None:
        call, self._last = self._last, None
        if call is None or not self._bypass_guards or torch.is_grad_enabled():
            return
        found = shortcut(args, result, call)
        if found is not None:
            if len(self._shortcuts) >= _SHORTCUTS:
                self._shortcuts.clear()
            self._shortcuts[self._lengths(args)] = found

    def _lengths(self, args: tuple[Tensor, ...]) -> tuple[torch.Size, ...]:
        """What tells calls apart whose sizes were all seen before."""
        return tuple([args[place].shape for place in self._varying])

    def _variant(self, args: tuple[Tensor, ...]) -> tuple[bool, ...]:
        """What calls may differ in that share no compiled code."""
        pairs = zip(args, self._symbolic, strict=True)
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(args[0].device.type),
            *(value.requires_grad for value in args),
            *(value.shape[dim] == 1 for value, dims in pairs for dim in dims),
        )

    def _prepare(self, args: tuple[Tensor, ...], variant: tuple[bool, ...]) -> bool:
        """Keep the compiler from taking this call's sizes for constants, sizes of one aside.

        Marks cost time, and matter only to calls that compile: the first of each kind.

        Returns: whether the call may compile.
        """
        first, dims = args[0], self._symbolic[0]
        sizes = ["*" if d in dims and s > 1 else str(s) for d, s in enumerate(first.shape)]
        shapes = f"[{', '.join(sizes)}]"
        if not self._new_shapes.admit(f"a variant of the {self.name} for {shapes}"):
            return False
        self._variants.add(variant)
        self._shapes = shapes
        for value, dynamic in zip(args, self._symbolic, strict=True):
            for dim in dynamic:
                torch._dynamo.maybe_mark_dynamic(value, dim)
        return True

    def _fall_back(self, error: Exception) -> Callable[..., Any]:
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip().splitlines() or ["no message"])[0]
        kind = f"{type(error).__name__}: {type(cause).__name__}"
        message = f"{self.name} runs uncompiled: {kind}: {reason}"
        logger.warning(message)
        self._log.fallbacks.append(message)
        self._compiled, self._run = False, self.module.forward
        return self._run

    def _partitioning(self) -> AbstractContextManager[None]:
        if self._memory_budget is None:
            return nullcontext()
        config: Any = torch._functorch.config
        patched: AbstractContextManager[None] = config.patch(
            activation_memory_budget=self._memory_budget
        )
        return patched

    def _recording(self, backend: str) -> Callable[..., Any]:
        compile_graph: Callable[..., Any] = torch._dynamo.lookup_backend(backend)

        def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self._log.started(self.name, self._shapes)
            started = time.perf_counter()
            with self._partitioning(), output_code() as code:
                compiled: Callable[..., Any] = compile_graph(graph, inputs)
            self.output_code += code
            self._log.finished(self.name, self._shapes, time.perf_counter() - started)

            def noted(*values: Any) -> Any:
                outputs = compiled(*values)
                self._last = GraphCall(compiled, values, outputs)
                return outputs

            return noted if self._bypass_guards else compiled

        return compiler


class Recomputable:
    """A body whose activations are computed again in backward instead of kept, where asked for.

    Takes the part of HF's gradient checkpointing: one decoder layer is the unit.
    """

    def __init__(self, body: Body) -> None:
        self.name = body.name
        self._body = body

    def __call__(self, *args: Tensor) -> Any:
        if _RECOMPUTE.get():
            return checkpoint(self._body, *args, use_reentrant=False)
        return self._body(*args)


@contextmanager
def recomputing(wanted: bool) -> Iterator[None]:
    """Whether recomputable bodies that are called meanwhile do so."""
    token = _RECOMPUTE.set(wanted)
    try:
        yield
    finally:
        _RECOMPUTE.reset(token)


def _placeholders(graph: fx.Graph) -> Iterable[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def _symbolic_dims(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(d for d, size in enumerate(value.shape) if is_symbolic(size))
