"""Lower a program: a short top graph over layer bodies that are compiled once.

    hidden = body_0(hidden, cos, sin, *parameters of layer 0)
    hidden = body_0(hidden, cos, sin, *parameters of layer 1)
    ...

The nodes of a layer, and those of a scoring, become a *piece*: a function of its live-ins and its
parameters. Pieces that are equal but for the parameters share one *body*, compiled with symbolic
batch and length, so that 32 layers cost as much to compile as two or three, and another prompt
length nothing. What lies between pieces (token bookkeeping, RoPE tables) runs as it is.
"""

import logging
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from hidrop_fx.collection import collection_paused
from hidrop_fx.new_shapes import COMPILE, NewShapes
from hidrop_fx.output_code import output_code
from hidrop_fx.program import Program, is_symbolic
from hidrop_fx.shortcuts import GraphCall, Shortcut, shortcut

logger = logging.getLogger("hidrop_fx")

Backend = Literal["inductor", "aot_eager", "eager"]
Lowering = Literal["bodies", "whole"]
BACKENDS: tuple[str, ...] = ("inductor", "aot_eager", "eager")
LOWERINGS: tuple[str, ...] = ("bodies", "whole")

# Lengths that a body remembers compiled code for.
_SHORTCUTS = 64

# What dynamo, AOTAutograd and Inductor raise when they, and not the program, are at fault.
_COMPILER_ERRORS = (
    torch._dynamo.exc.TorchDynamoException,
    torch._inductor.exc.InductorError,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)


_RECOMPUTE: ContextVar[bool] = ContextVar("recompute", default=False)


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


class Body:
    """A function that structurally equal pieces share, compiled at its first call.

    If the compiler fails, or its limit of variants is reached, the body logs one line and runs
    uncompiled from then on: slower, never wrong.

    Args: new_shapes: whether a call that would compile may.
        direct: calls without gradients may go straight to the compiled code that served an
        equal one; only for a module that writes to none of its inputs.
    """

    def __init__(
        self,
        name: str,
        module: fx.GraphModule,
        backend: str,
        log: CompileLog,
        new_shapes: NewShapes = COMPILE,
        memory_budget: float | None = None,
        direct: bool = False,
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
        self._direct = direct
        self._shortcuts: dict[torch.Size, Shortcut] = {}
        self._last: GraphCall | None = None

    def __call__(self, *args: Tensor) -> Any:
        if not self._compiled:
            return self._run(*args)
        known = self._shortcuts.get(args[0].shape)
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
        if call is None or not self._direct or torch.is_grad_enabled():
            return
        found = shortcut(args, result, call)
        if found is not None:
            if len(self._shortcuts) >= _SHORTCUTS:
                self._shortcuts.clear()
            self._shortcuts[args[0].shape] = found

    def _variant(self, args: tuple[Tensor, ...]) -> tuple[bool, ...]:
        """What calls may differ in that share no compiled code."""
        pairs = zip(args, self._symbolic, strict=True)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
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

            return noted if self._direct else compiled

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


class Executable:
    """A program that can be called: named tensors in, named tensors out.

    Attributes:
        program: what it was made from.
        top: the graph that calls the bodies.
        bodies: by name; each with the pieces that share it in `used_by`.
    """

    def __init__(self, program: Program, top: fx.GraphModule, bodies: dict[str, Body]) -> None:
        self.program = program
        self.top = top
        self.bodies = bodies
        self.inputs = tuple(program.inputs)
        self.calls = 0

    def __call__(self, inputs: dict[str, Tensor], *, recompute: bool = False) -> dict[str, Tensor]:
        """Run.

        Args:
            recompute: let layers compute their activations again in backward.
        """
        self.calls += 1
        if recompute and not self.layered:
            logger.warning(
                "gradient checkpointing has no effect with lowering='whole', where layers are not "
                "called one by one; use lowering='bodies' or activation_memory_budget"
            )
        token = _RECOMPUTE.set(recompute)
        try:
            outputs: dict[str, Tensor] = self.top(*[inputs[name] for name in self.inputs])
        finally:
            _RECOMPUTE.reset(token)
        return outputs

    @property
    def layered(self) -> bool:
        """Whether decoder layers are called one by one."""
        return not any(body.name.endswith("program") for body in self.bodies.values())


def lower(
    program: Program,
    *,
    backend: str,
    lowering: str,
    log: CompileLog,
    shared: dict[str, Body],
    new_shapes: NewShapes = COMPILE,
    memory_budget: float | None = None,
) -> Executable:
    """Make a program executable.

    Args:
        backend: "inductor", "aot_eager" (graphs through AOTAutograd, no code generation) or "eager".
        lowering: "bodies", or "whole" to compile the program as one graph.
        new_shapes: whether what was not compiled yet may be.
        shared: bodies made so far, by structure; equal pieces of other programs reuse them.
        memory_budget: share of the activations to keep for backward, in (0, 1]; PyTorch's
            `activation_memory_budget`.
    """
    make = partial(
        Body, backend=backend, log=log, new_shapes=new_shapes, memory_budget=memory_budget
    )
    if lowering == "whole":
        return _lower_whole(program, make)
    top, bodies = _outline(program, _pieces(program), make, shared)
    return Executable(program, top, bodies)


def _lower_whole(program: Program, make: Callable[..., Body]) -> Executable:
    body = make(f"{program.kind} program", program.module)
    body.used_by.append(program.kind)
    top = fx.Graph()
    inputs = [top.placeholder(name) for name in program.inputs]
    top.output(top.call_module("program", tuple(inputs)))
    return Executable(program, _module({"program": body}, top, "Top"), {body.name: body})


def _pieces(program: Program) -> dict[fx.Node, str]:
    named = dict(program.pieces)
    for region in program.regions:
        named |= dict.fromkeys(region.nodes, f"layer_{region.layer}")
    return named


def _outline(
    program: Program,
    pieces: dict[fx.Node, str],
    make: Callable[..., Body],
    shared: dict[str, Body],
) -> tuple[fx.GraphModule, dict[str, Body]]:
    """Replace every piece by one call of its body."""
    members: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node in pieces:
            members.setdefault(pieces[node], []).append(node)

    top = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    used: dict[str, Body] = {}
    for unit in _schedule(program.graph, pieces, members):
        if isinstance(unit, fx.Node):
            copies[unit] = top.node_copy(unit, copies.__getitem__)
            continue
        nodes = members[unit]
        live_ins, live_outs = _boundary(nodes)
        module, key = _extract(nodes, live_ins, live_outs)
        body = shared.get(key)
        if body is None:
            kind = unit.rsplit("_", 1)[0]
            count = sum(b.name.startswith(f"{program.kind} {kind}") for b in shared.values())
            body = make(
                f"{program.kind} {kind} body {count + 1}", module, direct=program.kind != "decode"
            )
            shared[key] = body
        body.used_by.append(f"{program.kind} {unit}")
        used[body.name.replace(" ", "_")] = body
        call = top.call_module(
            body.name.replace(" ", "_"), tuple(copies[node] for node in live_ins)
        )
        call.meta["hidrop"] = unit
        call.meta["recomputable"] = program.kind == "train" and unit.startswith("layer_")
        if len(live_outs) == 1:
            copies[live_outs[0]] = call
        else:
            for index, node in enumerate(live_outs):
                copies[node] = top.call_function(operator.getitem, (call, index))
    top.lint()
    return _module({**_attributes(program.module, top), **used}, top, "Top"), used


def _schedule(
    graph: fx.Graph, pieces: dict[fx.Node, str], members: dict[str, list[fx.Node]]
) -> list[fx.Node | str]:
    """Nodes outside pieces and names of pieces, each after all that it reads."""
    done: set[fx.Node] = set()
    order: list[fx.Node | str] = []
    waiting: list[fx.Node | str] = []
    for node in graph.nodes:
        unit: fx.Node | str = pieces.get(node, node)
        if unit not in waiting:
            waiting.append(unit)
    while waiting:
        ready = None
        for unit in waiting:
            nodes = members[unit] if isinstance(unit, str) else [unit]
            inside = set(nodes)
            if all(n in done or n in inside for m in nodes for n in m.all_input_nodes):
                ready = unit
                break
        if ready is None:
            raise AssertionError(f"pieces depend on each other in a circle: {waiting[:4]}")
        waiting.remove(ready)
        order.append(ready)
        done.update(members[ready] if isinstance(ready, str) else [ready])
    return order


def _boundary(nodes: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Live-ins (values first, then parameters) and live-outs of a piece."""
    inside = set(nodes)
    reads = dict.fromkeys(n for m in nodes for n in m.all_input_nodes if n not in inside)
    live_ins = [n for n in reads if n.op != "get_attr"] + [n for n in reads if n.op == "get_attr"]
    live_outs = [n for n in nodes if any(user not in inside for user in n.users)]
    return live_ins, live_outs


def _extract(
    nodes: list[fx.Node], live_ins: list[fx.Node], live_outs: list[fx.Node]
) -> tuple[fx.GraphModule, str]:
    """A piece as a module of its own, and a key that equal pieces have in common."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    numbers: dict[fx.Node, str] = {}
    key: list[str] = []
    for index, node in enumerate(live_ins):
        copies[node] = graph.placeholder(
            f"parameter_{index}" if node.op == "get_attr" else node.name
        )
        copies[node].meta["val"] = node.meta["val"]
        numbers[node] = f"%{len(numbers)}"
        key.append(_signature(node))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        numbers[node] = f"%{len(numbers)}"
        args: Any = fx.map_arg((node.args, node.kwargs), lambda n: _Number(numbers[n]))  # type: ignore[arg-type, return-value]
        key.append(f"{node.target}{args}")
    outputs = [copies[node] for node in live_outs]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    key.append(" ".join(numbers[node] for node in live_outs))
    return fx.GraphModule({}, graph, "Body"), "\n".join(key)


@dataclass(frozen=True)
class _Number:
    text: str

    def __repr__(self) -> str:
        return self.text


def _signature(node: fx.Node) -> str:
    value: Tensor = node.meta["val"]
    sizes = ["*" if is_symbolic(s) else str(s) for s in value.shape]
    return f"{value.dtype}[{', '.join(sizes)}] {value.device} {node.meta.get('layout', '')}"


def _attributes(module: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    names = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    return {name: operator.attrgetter(name)(module) for name in names}


def _module(attributes: dict[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module whose bodies are plain callables."""
    bodies = {k: v for k, v in attributes.items() if isinstance(v, Body)}
    tensors = {k: v for k, v in attributes.items() if k not in bodies}
    for node in graph.nodes:
        if node.op == "call_module":
            body = bodies[node.target]
            target: Any = Recomputable(body) if node.meta.get("recomputable") else body
            target.__name__ = body.name.replace(" ", "_")
            node.op, node.target = "call_function", target
    module = fx.GraphModule(tensors, graph, name)
    return module


def _placeholders(graph: fx.Graph) -> Iterable[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def _symbolic_dims(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(d for d, size in enumerate(value.shape) if is_symbolic(size))
