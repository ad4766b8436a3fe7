"""The history of a program: a stage for the captured graph, and one after every pass.

print(program.history)               # a table of contents
print(program.history[3])            # stage 3 as Python, with shapes
print(program.history.diff(2, 3))    # what the third pass changed
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from hidrop_fx.program import codegen
from hidrop_fx.program.codegen import Line
from hidrop_fx.program.graph_record import GraphRecord
from hidrop_fx.program.operands import operand_text
from hidrop_fx.program.symbols import Symbols
from hidrop_fx.surroundings import neutral_surroundings


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """The outcome of a pass."""

    matched: int
    """Places that it rewrote."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StageSegment:
    """A token set, as a stage knows it."""

    name: str
    """E.g. "prune_10"."""
    start: int
    """The first layer that sees it."""
    length: str
    """Name of its symbolic length."""
    columns: str | None
    """The node that holds the prompt column of each token; None in decode."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Consecutive lines of one decoder layer, or of the glue between two."""

    title: str
    layer: int | None
    """None for glue."""
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The graph after one pass."""

    name: str
    """Name of the pass; "captured" for the first."""
    options: Mapping[str, Any]
    result: PassResult
    milliseconds: float
    recorded: GraphRecord
    kind: str = ""
    """Purpose of the program: "prefill", "train" or "decode"."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """Node -> the decoder layer that it belongs to."""
    paths: tuple[str, ...] = ()
    """Module path of each layer."""
    live_outs: tuple[str, ...] = ()
    """The node of each layer's output hidden states."""
    segments: tuple[StageSegment, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    """Node -> the pass that made it."""
    symbols: Symbols = field(default_factory=Symbols)
    fake_mode: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    """Shapes worked out so far, by operator and operands; the stages of a program share it."""

    @cached_property
    def graph(self) -> fx.Graph:
        """A copy of the program's graph as it was, made when it is first asked for."""
        return self.recorded.graph()

    @property
    def title(self) -> str:
        """The pass, its options, what it matched, how large the graph is, how long it took."""
        options = "".join(f" {k}={v}" for k, v in self.options.items())
        nodes = len(self.recorded)
        head = f"{self.name}{options}: {self.result.matched} matched, {nodes} nodes, {self.milliseconds:.1f} ms"
        return f"{head}{'. ' + self.result.note if self.result.note else ''}"

    @property
    def code(self) -> str:
        """The graph as Python, with shapes: `def forward(self, ...)`, `self` being the decoder."""
        return self.as_code(comments=True)

    def as_code(self, *, comments: bool) -> str:
        """Format the graph as Python.

        Args:
            comments: write shapes and passes beside the lines.
        """
        names = codegen.variables(self.graph)
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        width = max((len(names[n]) for n in inputs), default=0)
        lines = [codegen.signature(self.graph)]
        for node in inputs if comments else []:
            shape = codegen.shape_text(self.shapes.get(node), self.symbols)
            lines.append(f"    # {names[node]:<{width}}  {shape}")
        for section in self.sections:
            lines += ["", f"    # {section.title}"]
            lines += [f"    {line.text}{_comment(line) * comments}" for line in section.lines]
        return "\n".join([*lines, "", f"    {codegen.returned(self.graph)}", ""])

    @cached_property
    @neutral_surroundings()
    def shapes(self) -> dict[fx.Node, Any]:
        """Values without data for every node, as far as they can be worked out."""
        known: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                known[node] = node.meta.get("val")
            elif node.op == "call_function" and self.fake_mode is not None:
                known[node] = self._propagated(node, known)
        return known

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The lines, layer by layer, with the glue between."""
        lines = codegen.statements(self.graph, self.shapes, self.origins, self.symbols)
        groups: list[tuple[str, int | None, list[Line]]] = []
        previous = -1
        for node, line in lines.items():
            layer = self.layers.get(node.name)
            previous = previous if layer is None else layer
            # A value that nobody reads is an effect of the layer before it, such as the writing of its KV.
            directly = bool(groups) and (groups[-1][0] == "after" or groups[-1][1] is not None)
            effect = layer is None and not node.users and directly
            place = "after" if effect else "before"
            key = (place, previous if place == "after" else layer)
            if not groups or groups[-1][:2] != key:
                groups.append((*key, []))
            groups[-1][2].append(line)
        following: int | None = None
        found = []
        for place, layer, members in reversed(groups):
            if place == "after":
                title, layer = f"after layer {layer}", None
            else:
                following = layer if layer is not None else following
                title = self._title(layer, following)
            found.append(Section(title=title, layer=layer, lines=tuple(members)))
        return tuple(reversed(found))

    def segment_of(self, layer: int) -> StageSegment | None:
        """Return the token set of a layer; None in a stage before there are segments."""
        seen = [segment for segment in self.segments if segment.start <= layer]
        return seen[-1] if seen else None

    def __str__(self) -> str:
        return f"# {self.title}\n{self.code}"

    def _propagated(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        """Infer a node's value without data; None where inference fails, so that a broken graph prints."""
        if any(known.get(source) is None for source in node.all_input_nodes):
            return None
        key = f"{node.target}{operand_text(node, lambda n: _value_text(known[n]))}"
        if key not in self.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            try:
                with self.fake_mode:
                    self.values[key] = node.target(*args, **kwargs)  # type: ignore[operator]
            except Exception:
                self.values[key] = None
        return self.values[key]

    def _title(self, layer: int | None, following: int | None) -> str:
        if layer is None:
            return "after the last layer" if following is None else f"before layer {following}"
        segment = self.segment_of(layer)
        tokens = f": tokens of {segment.name}" if segment is not None else ""
        return f"layer {layer} ({self.paths[layer]}){tokens}"


def _value_text(value: Any) -> str:
    """Return what the shape of a result depends on."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}"


class History(list[Stage]):
    """The stages of a program, in order. Indexes as a list; names work where an index does."""

    def diff(
        self, before: int | str, after: int | str, *, context: int = 2, shapes: bool = False
    ) -> str:
        """Return the unified diff between the code of two stages.

        Args:
            before: index, or name of a pass.
            after: likewise.
            context: equal lines around each change.
            shapes: compare the comments too. A pass that cuts a segment changes the shapes of every
                line after it.
        """
        old, new = self.stage(before), self.stage(after)
        lines = difflib.unified_diff(
            old.as_code(comments=shapes).splitlines(),
            new.as_code(comments=shapes).splitlines(),
            fromfile=old.name,
            tofile=new.name,
            n=context,
            lineterm="",
        )
        return "\n".join(lines)

    def stage(self, wanted: int | str) -> Stage:
        """Return a stage by index, or by the name of its pass.

        Raises:
            KeyError: there is no pass of that name.
        """
        if isinstance(wanted, int):
            return self[wanted]
        for stage in self:
            if stage.name == wanted:
                return stage
        names = ", ".join(stage.name for stage in self)
        raise KeyError(f"no stage {wanted!r} in this history; it has {names}")

    def __str__(self) -> str:
        return "\n".join(f"{index:>2}  {stage.title}" for index, stage in enumerate(self))


def _comment(line: Line) -> str:
    origin = "" if line.origin == "captured" else f"<- {line.origin}"
    words = " ".join(filter(None, (line.shape, origin)))
    return f"  # {words}" if words else ""
