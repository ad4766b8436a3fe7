"""Stages of a program as files: Python that a person reads, edits, and that runs.

    write_stage(path, stage, index)
    loaded = load_stage(path)
    values = loaded.run(decoder, {"text_embeds": ..., ...})     # outputs and every layer's states

A loaded stage is run statement by statement, so that an error names its line, and a value is let go
after its last use, as in the graph itself.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hidrop_fx.errors import HidropError
from hidrop_fx.ops.attention import repeat_heads
from hidrop_fx.program import codegen
from hidrop_fx.program.history import Stage

_INPUTS, _LAYERS, _STREAMS = "INPUTS", "LAYERS", "STREAMS"


def write_stage(path: Path, stage: Stage, index: int) -> None:
    """Write a stage as a Python file that `load_stage` takes."""
    path.write_text(_file(stage, index), encoding="utf-8")


@dataclass(kw_only=True)
class StageRun:
    """Result of a stage's run."""

    hidden: list[Tensor]
    """For each layer [B, S, D]."""
    columns: list[Tensor] | None
    """For each layer [B, S]; None in a stage that has no segments."""
    output: Any
    """Return value of `forward`."""


@dataclass(kw_only=True)
class LoadedStage:
    """A stage read from its file."""

    path: Path
    name: str
    """Of the pass."""
    layers: list[tuple[str, str]]
    """Module path of each layer, and the variable that it hands on."""
    segments: list[tuple[str, int, str | None]]
    """Name, first layer and column variable of every token set."""
    inputs: dict[str, tuple[str, list[int | str]]]
    """dtype and shape of every input, sizes by name where they are symbolic."""
    _globals: dict[str, Any] = field(repr=False)
    _forward: ast.FunctionDef = field(repr=False)

    def run(self, decoder: Any, inputs: Mapping[str, Any]) -> StageRun:
        """Run the stage eagerly; inputs that are not given are empty buffers.

        Raises:
            HidropError: a line fails; names file, line and statement.
        """
        given = self._with_buffers(inputs)
        names = [a.arg for a in self._forward.args.args if a.arg != "self"]
        values: dict[str, Any] = {name: given[name] for name in names}
        wanted = {variable for _, variable in self.layers}
        wanted |= {columns for _, _, columns in self.segments if columns is not None}
        kept: dict[str, Any] = {}
        space = {**self._globals, "self": decoder}
        for statement, dead in _with_last_uses(self._forward.body):
            if isinstance(statement, ast.Return):
                assert statement.value is not None
                output = self._evaluate(statement, space, values)
                break
            self._evaluate(statement, space, values)
            for name in _assigned(statement) & wanted:
                kept[name] = values[name]
            for name in dead:
                values.pop(name, None)
        else:
            raise HidropError(f"{self.path}: forward returns nothing")
        kept |= {name: given[name] for name in wanted & given.keys()}
        columns = [self._columns_of(layer, kept) for layer in range(len(self.layers))]
        return StageRun(
            hidden=[kept[variable] for _, variable in self.layers],
            columns=None if any(c is None for c in columns) else columns,  # type: ignore[arg-type]
            output=output,
        )

    def _columns_of(self, layer: int, kept: Mapping[str, Any]) -> Tensor | None:
        seen = [columns for _, start, columns in self.segments if start <= layer]
        return None if not seen or seen[-1] is None else kept[seen[-1]]

    def _with_buffers(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(inputs)
        sizes: dict[str, int] = {}
        for name, (_, shape) in self.inputs.items():
            value = inputs.get(name)
            if isinstance(value, Tensor):
                sizes |= {s: n for s, n in zip(shape, value.shape, strict=True) if type(s) is str}
        device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
        for name, (dtype, shape) in self.inputs.items():
            if name in found:
                continue
            unknown = [s for s in shape if type(s) is str and s not in sizes]
            if unknown:
                raise HidropError(
                    f"{self.path.name} takes {name} of shape {shape}, and nothing that was given tells "
                    f"{', '.join(map(str, unknown))}"
                )
            full = [sizes[s] if type(s) is str else int(s) for s in shape]
            found[name] = torch.zeros(full, dtype=getattr(torch, dtype), device=device)
        return found

    def _evaluate(self, statement: ast.stmt, space: dict[str, Any], values: dict[str, Any]) -> Any:
        try:
            if isinstance(statement, ast.Return):
                assert statement.value is not None
                code = compile(ast.Expression(statement.value), str(self.path), "eval")
                return eval(code, space, values)
            exec(compile(ast.Module([statement], []), str(self.path), "exec"), space, values)
        except Exception as error:
            line = ast.unparse(statement)
            raise HidropError(
                f"{self.path.name}, line {statement.lineno}: {line}: {type(error).__name__}: {error}"
            ) from error
        return None


def load_stage(path: Path) -> LoadedStage:
    """Read a stage file.

    Raises:
        HidropError: it is not one, or it calls what cannot be imported.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (OSError, SyntaxError) as error:
        raise HidropError(f"cannot read the stage {path}: {error}") from error
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
    if not functions:
        raise HidropError(f"{path} has no `def forward`; is it a stage written by hidrop_fx.dump?")
    space: dict[str, Any] = {}
    head = [node for node in tree.body if node is not functions[0]]
    try:
        exec(compile(ast.Module(head, []), str(path), "exec"), space)
    except Exception as error:
        raise HidropError(
            f"{path.name} cannot be loaded: {type(error).__name__}: {error}; functions that passes "
            "insert must be importable, at the top level of a module"
        ) from error
    space["hidrop"] = SimpleNamespace(attention=SimpleNamespace(default=_attention))
    return LoadedStage(
        path=path,
        name=path.stem.split("_", 1)[1],
        layers=space[_LAYERS],
        segments=space[_STREAMS],
        inputs=space[_INPUTS],
        _globals=space,
        _forward=functions[0],
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Compute the captured attention, which no pass has replaced yet; causal without a mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    causal = mask is None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale
    )


def _file(stage: Stage, index: int) -> str:
    names = {node.name: name for node, name in codegen.variables(stage.graph).items()}
    layers = [(path, names[node]) for path, node in zip(stage.paths, stage.live_outs, strict=True)]
    segments = [
        (s.name, s.start, None if s.columns is None else names[s.columns]) for s in stage.segments
    ]
    options = "".join(f" {k}={v}" for k, v in stage.options.items())
    note = f"\n{stage.result.note}." if stage.result.note else ""
    return "\n".join(
        [
            f'"""Stage {index} of a {stage.kind} program: {stage.name}{options}.',
            note,
            f"{stage.result.matched} matched, {len(stage.graph.nodes)} nodes, {stage.milliseconds:.1f} ms. "
            "`self` is the text decoder. It may be edited; hidrop_fx.replay runs it.",
            '"""',
            "",
            *codegen.imports(stage.graph),
            "",
            "# Module path of each layer, and the variable of the hidden states that it hands on.",
            f"{_LAYERS} = [",
            *(f"    {entry!r}," for entry in layers),
            "]",
            "# Token sets: name, first layer that sees it, variable of its columns.",
            f"{_STREAMS} = [",
            *(f"    {entry!r}," for entry in segments),
            "]",
            "# dtype and shape of the inputs.",
            f"{_INPUTS} = {{",
            *(f"    {names[n.name]!r}: {_spec(n, stage)!r}," for n in _inputs(stage)),
            "}",
            "",
            "",
            stage.code,
        ]
    )


def _inputs(stage: Stage) -> Iterator[fx.Node]:
    return (node for node in stage.graph.nodes if node.op == "placeholder")


def _spec(node: fx.Node, stage: Stage) -> tuple[str, list[int | str]]:
    value = stage.shapes[node]
    symbols = stage.symbols
    sizes = [
        symbols.name(s) if symbols.is_symbolic(s) or type(s) is not int else s for s in value.shape
    ]
    return str(value.dtype).removeprefix("torch."), sizes


def _with_last_uses(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, set[str]]]:
    """Return every statement with the names that nothing after it reads."""
    last: dict[str, int] = {}
    for index, statement in enumerate(body):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                last[node.id] = index
    dead: dict[int, set[str]] = {}
    for name, index in last.items():
        dead.setdefault(index, set()).add(name)
    return ((statement, dead.get(index, set())) for index, statement in enumerate(body))


def _assigned(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
