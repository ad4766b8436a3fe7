"""A layer body: the function that structurally equal subgraphs share, compiled at its first call."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.lowering.compile_log import CompileLog
from hidrop_fx.lowering.compilers import COMPILER_ERRORS, Compiler, logged_compiler
from hidrop_fx.lowering.gc_pause import collection_paused
from hidrop_fx.lowering.guard_bypass import CompiledCall, GuardBypass, bypass_for
from hidrop_fx.lowering.shape_policy import COMPILE, ShapePolicy
from hidrop_fx.surroundings import (
    has_default_device,
    in_dispatch_mode,
    warnings_are_no_errors,
    without_function_modes,
)

logger = logging.getLogger("hidrop_fx")

# Combinations of input shapes for which a body keeps a way around the guards.
_MAX_BYPASSES = 64


class Body:
    """A layer body.

    If the compiler fails, or its limit of variants is reached, the body logs one line and runs
    uncompiled from then on: slower, never wrong. So it runs, for the time being, under a dispatch mode that is to
    see every operator (FLOP counters, loggers): torch.compile compiles nothing there, and compiled code
    would show it a part of them.

    Attributes:
        name: e.g. "prefill layer body 1"; "decode program" for a program compiled as one graph.
        module: the subgraph as a module without parameters: values first, then parameters.
        used_by: the subgraphs that share it, e.g. "prefill layer_3".
        output_code: generated code, one module a variant; empty where the backend generates none.
    """

    def __init__(
        self,
        name: str,
        module: fx.GraphModule,
        backend: str,
        log: CompileLog,
        shape_policy: ShapePolicy = COMPILE,
        memory_budget: float | None = None,
        bypass_guards: bool = False,
    ) -> None:
        """Prepare a body for its first call.

        Args:
            name: name of the body, unique in a compiled model.
            module: the subgraph, with fake values in `meta["val"]` of its placeholders.
            backend: "eager", or a backend of torch.compile.
            log: log of compilations and fallbacks.
            shape_policy: policy for calls that would compile.
            memory_budget: share of the activations to keep for backward, in (0, 1].
            bypass_guards: let calls without gradients bypass Dynamo's guards where an equal call
                passed them before. A module that writes to an input must not get inputs that
                share memory.
        """
        self.name = name
        self.module = module
        self.used_by: list[str] = []
        self.output_code: list[str] = []
        self._log = log
        self._shape_policy = shape_policy
        self._symbolic = [
            _symbolic_dims(node) for node in module.graph.nodes if node.op == "placeholder"
        ]
        self._run: Callable[..., Any] = module.forward
        self._compiled = backend != "eager"
        self._bypass_guards = bypass_guards
        if self._compiled:
            compiler = logged_compiler(
                backend,
                name,
                lambda inputs: self._shapes,
                log,
                written=self.output_code,
                memory_budget=memory_budget,
            )
            if bypass_guards:
                compiler = self._noting(compiler)
            self._run = torch.compile(
                module.forward,
                backend=compiler,
                fullgraph=True,
                dynamic=False,
                options={"guard_filter_fn": _guards_that_matter},
            )
        self._shapes = ""
        self._variants: set[tuple[bool, ...]] = set()
        self._varying = [place for place, dims in enumerate(self._symbolic) if dims]
        self._bypasses: dict[tuple[torch.Size, ...], GuardBypass] = {}
        self._last: CompiledCall | None = None

    def __call__(self, *args: Tensor) -> Any:
        """Call the body with values, then parameters; returns its live-out, or a tuple of them.

        Raises:
            InputError: the call would compile, and the policy for new shapes is "error".
        """
        if not self._compiled:
            return self._run(*args)
        if in_dispatch_mode():
            self._log.note_dispatch_mode()
            return self.module.forward(*args)
        if self._bypass_guards:
            bypass = self._bypasses.get(self._lengths(args))
            if bypass is not None and bypass.fits(args):
                return bypass(args)
        variant = self._variant(args)
        compiles = variant not in self._variants
        if compiles and not self._prepare(args, variant):
            return self.module.forward(*args)
        try:
            with _surroundings(compiles):
                result = self._run(*args)
        except COMPILER_ERRORS as error:
            return self._fall_back(error)(*args)
        self._remember(args, result)
        return result

    def _lengths(self, args: tuple[Tensor, ...]) -> tuple[torch.Size, ...]:
        """Return the shapes of the inputs that have symbolic dims."""
        return tuple([args[place].shape for place in self._varying])

    def _variant(self, args: tuple[Tensor, ...]) -> tuple[bool, ...]:
        """Return the compilation key: grad mode, autocast, requires_grad, symbolic dims of size 1."""
        pairs = zip(args, self._symbolic, strict=True)
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(args[0].device.type),
            *(value.requires_grad for value in args),
            *(value.shape[dim] == 1 for value, dims in pairs for dim in dims),
        )

    def _prepare(self, args: tuple[Tensor, ...], variant: tuple[bool, ...]) -> bool:
        """Ask the policy, then mark symbolic dims dynamic so that Dynamo does not specialise them.

        A size of 1 is specialised all the same. Marking takes time, so only the first call of each
        variant does it.

        Returns:
            True if the call may compile.
        """
        first, dims = args[0], self._symbolic[0]
        sizes = ["*" if d in dims and s > 1 else str(s) for d, s in enumerate(first.shape)]
        shapes = f"[{', '.join(sizes)}]"
        if not self._shape_policy.admit(f"a variant of the {self.name} for {shapes}"):
            return False
        self._variants.add(variant)
        self._shapes = shapes
        for value, dynamic in zip(args, self._symbolic, strict=True):
            for dim in dynamic:
                torch._dynamo.maybe_mark_dynamic(value, dim)
        return True

    def _fall_back(self, error: Exception) -> Callable[..., Any]:
        """Log a failed compilation and run uncompiled from now on."""
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip().splitlines() or ["no message"])[0]
        kind = f"{type(error).__name__}: {type(cause).__name__}"
        message = f"{self.name} runs uncompiled: {kind}: {reason}"
        logger.warning(message)
        self._log.fallbacks.append(message)
        self._compiled, self._run = False, self.module.forward
        return self._run

    def _noting(self, compiler: Compiler) -> Compiler:
        """Wrap a compiler so that each call of its code is noted in `_last`."""

        def noting(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            compiled = compiler(graph, inputs)

            def noted(*values: Any) -> Any:
                outputs = compiled(*values)
                self._last = CompiledCall(compiled, values, outputs)
                return outputs

            return noted

        return noting

    def _remember(self, args: tuple[Tensor, ...], result: Any) -> None:
        """Keep a bypass for calls equal to this one."""
        call, self._last = self._last, None
        if call is None or torch.is_grad_enabled():
            return
        bypass = bypass_for(args, result, call)
        if bypass is not None:
            if len(self._bypasses) >= _MAX_BYPASSES:
                self._bypasses.clear()
            self._bypasses[self._lengths(args)] = bypass


def _surroundings(compiles: bool) -> AbstractContextManager[Any]:
    """Return what a call of compiled code runs under: no default device, for which torch.compile compiles anew."""
    if not (compiles or has_default_device()):
        return nullcontext()
    stack = ExitStack()
    if has_default_device():
        stack.enter_context(without_function_modes())
    if compiles:
        stack.enter_context(collection_paused())
        stack.enter_context(warnings_are_no_errors())
    return stack


def _guards_that_matter(guards: Sequence[Any]) -> list[bool]:
    """Leave out the default device: every tensor that a body makes names its own."""
    return [guard.guard_type != "DEFAULT_DEVICE" for guard in guards]


def _symbolic_dims(node: fx.Node) -> tuple[int, ...]:
    dims: tuple[int, ...] = node.meta.get("symbolic_dims", ())
    return dims
