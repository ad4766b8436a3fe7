"""Print a graph as Python that a person can read, and that runs as it stands.

    # layer 2 (layers.2): tokens of prune_2
    take_tokens_3 = tokens.take_tokens(add_11, find_columns_3)  # f32[batch, prune_2, 32] <- prune
    linear_14 = aten.linear.default(mul_12, self.layers[2].self_attn.q_proj.weight)  # f32[...]

`self` is the text decoder, whose parameters are written where they are read. Behind `#` stand the
shape and, for what the model's own code did not make, the pass that put the line there.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import module_path
from hidrop_fx.program.symbols import Symbols

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_GLOBALS = ("torch", "aten", "hidrop", "self", "import_module")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One node."""

    node: str
    """Its name in the graph."""
    text: str
    """The statement, without comment."""
    shape: str
    """E.g. "f32[batch, text, 32]"; "" where it is not known."""
    origin: str
    """The pass that made it; "captured" for the model's own."""
    path: str
    """Module path in the decoder, "" for glue."""
    source: str
    """File and line of the code that made it, as far as it is known."""


def variables(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return a Python name for every node: its own, unless that is taken by something the code reads."""
    taken = {*_GLOBALS, *_modules(graph).values()}
    names = {node.name for node in graph.nodes}
    found = {}
    for node in graph.nodes:
        name = node.name
        while name in taken or (name != node.name and name in names):
            name += "_"
        found[node] = name
    return found


def statements(
    graph: fx.Graph,
    shapes: Mapping[fx.Node, Any],
    origins: Mapping[str, str],
    symbols: Symbols,
) -> dict[fx.Node, Line]:
    """Return a `Line` for every call in the graph, in order."""
    names, modules = variables(graph), _modules(graph)
    return {
        node: Line(
            node=node.name,
            text=f"{names[node]} = {_expression(node, names, modules)}",
            shape=shape_text(shapes.get(node), symbols),
            origin=origins.get(node.name, "captured"),
            path=module_path(node),
            source=_source(node),
        )
        for node in graph.nodes
        if node.op == "call_function"
    }


def signature(graph: fx.Graph) -> str:
    """Return the line that opens the function."""
    names = variables(graph)
    inputs = [names[node] for node in graph.nodes if node.op == "placeholder"]
    return f"def forward({', '.join(['self', *inputs])}):"


def returned(graph: fx.Graph) -> str:
    """Return the line that closes it."""
    return f"return {_literal(graph.output_node().args[0], variables(graph))}"


def imports(graph: fx.Graph) -> list[str]:
    """Return the imports that the function needs above it."""
    lines = [
        "from importlib import import_module",
        "",
        "import torch",
        "",
        "aten, hidrop = torch.ops.aten, torch.ops.hidrop",
    ]
    return lines + [f'{alias} = import_module("{m}")' for m, alias in _modules(graph).items()]


def shape_text(value: Any, symbols: Symbols) -> str:
    """Format a tensor's dtype and shape, e.g. "f32[batch, text + vision, 32]"; "" for other values."""
    if not isinstance(value, Tensor):
        return ""
    sizes = ", ".join(symbols.name(size) for size in value.shape)
    return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"


def _modules(graph: fx.Graph) -> dict[str, str]:
    """Modules whose functions the graph calls -> the name that the code gives them."""
    functions = (n.target for n in graph.nodes if n.op == "call_function")
    modules = dict.fromkeys(_module_of(f) for f in functions)
    found: dict[str, str] = {}
    for module in sorted(m for m in modules if m):
        parts = module.split(".")
        depth = 1
        while "_".join(parts[-depth:]) in found.values() and depth < len(parts):
            depth += 1
        found[module] = "_".join(parts[-depth:])
    return found


def _module_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) or target is getattr:
        return ""
    return str(getattr(target, "__module__", "") or "")


def _expression(node: fx.Node, names: Mapping[fx.Node, str], modules: Mapping[str, str]) -> str:
    given = [_literal(a, names) for a in node.args]
    given += [f"{key}={_literal(a, names)}" for key, a in node.kwargs.items()]
    if getattr(node.target, "__name__", "") == "getitem":
        return f"{given[0]}[{given[1]}]"
    return f"{_function(node.target, modules)}({', '.join(given)})"


def _function(target: Callable[..., Any] | str, modules: Mapping[str, str]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        text = str(target)
        return text if text.startswith(("aten.", "hidrop.")) else f"torch.ops.{text}"
    name = str(getattr(target, "__qualname__", None) or getattr(target, "__name__", target))
    return f"{modules[_module_of(target)]}.{name.rsplit('>.', 1)[-1]}"


def _literal(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return attribute(str(value.target)) if value.op == "get_attr" else names[value]
    if isinstance(value, list):
        return f"[{', '.join(_literal(v, names) for v in value)}]"
    if isinstance(value, tuple):
        items = ", ".join(_literal(v, names) for v in value)
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_literal(v, names)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return f"slice({', '.join(_literal(p, names) for p in parts)})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return repr(value)


def attribute(target: str) -> str:
    """Format a parameter's path as Python: "layers.0.mlp.up_proj.weight" -> "self.layers[0].mlp...."."""
    return "self" + "".join(
        f"[{part}]" if part.isdigit() else f".{part}" for part in _parts(target)
    )


def _parts(target: str) -> Iterable[str]:
    return target.split(".")


def _source(node: fx.Node) -> str:
    """Return the innermost line of code, its path cut down to the package."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [line for line in lines if line.startswith("File ")]
    if not places:
        return ""
    file, line, *_ = places[-1].removeprefix("File ").split(", ")
    path = file.strip('"')
    short = path.split("site-packages/")[-1] if "site-packages/" in path else path.split("/")[-1]
    return f"{short}:{line.removeprefix('line ')}"
