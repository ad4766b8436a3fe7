"""A program: the graph that the passes rewrite, and the record of how it came about.

    program = Program(captured, plan, kind="prefill")
    for each pass: program.apply(pass, **options)
    print(program.history)

The graph starts as a copy of the captured one. Its decoder layers are `program.regions`; the token
sets that the layers see, in order, are `program.segments`.
"""

import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.late_module import LateModule
from hidrop_fx.capture.quantised import is_distributed, is_quantised, layout, plain_like
from hidrop_fx.capture.regions import Region, describe, find_regions
from hidrop_fx.errors import PassError
from hidrop_fx.planning import Event, Plan
from hidrop_fx.program.entry import Entry
from hidrop_fx.program.graph_record import GraphRecord
from hidrop_fx.program.history import History, PassResult, Stage, StageSegment
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.pass_function import Pass, pass_name
from hidrop_fx.program.slices import copy_slice
from hidrop_fx.program.symbols import Size, Symbols
from hidrop_fx.program.token_sets import Branch, SegmentNodes, Tables
from hidrop_fx.program.variant import Kind, Variant, program_name
from hidrop_fx.program.verify import lint, tidy, verify


class Program:
    """A decoder graph for one purpose, under rewriting.

    Attributes:
        kind: "prefill", "train" or "decode".
        variant: what tells it from other programs of its kind.
        module: the graph with the model's own parameters.
        regions: one per decoder layer.
        segments: the token sets, in the order in which the layers meet them.
        symbols: the symbolic sizes in its shapes.
        history: a `Stage` for the captured graph and after every pass.
    """

    def __init__(
        self,
        captured: CapturedDecoder,
        plan: Plan,
        kind: Kind,
        variant: Variant = Variant(),
        *,
        branch: CapturedDecoder | None = None,
    ) -> None:
        self.kind: Kind = kind
        self.variant = variant
        self.plan = plan
        self.captured = captured
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.captured_branch = branch
        """Layers of a side branch, as a decoder of their own; None if the plan has none."""
        more = frozenset() if branch is None else branch.static_sizes
        self.symbols = Symbols(captured.static_sizes | more)
        self.module = LateModule(captured.module, _copied(captured.module.graph), "Program")
        self.regions: list[Region] = find_regions(
            self.graph, captured.layers, captured.num_layers, captured.tokenwise
        )
        self.entry = Entry(self.graph, self.regions[0].hidden)
        self.segments: list[SegmentNodes] = []
        self.history = History()
        self.keys: dict[int, str] = {}
        """Layer -> the segment whose tokens it attends to, where that is not the segment of its rows."""
        self.subgraphs: dict[fx.Node, str] = {}
        """Nodes outside regions that are compiled together, with the name of their subgraph."""
        self.tables = Tables()
        """Set by `split_streams`."""
        self.extras: tuple[str, ...] = ()
        """Names of the outputs that custom passes added."""
        self.cuts: dict[int, fx.Node] = {}
        """By layer: places [B, G, n] of what its cache keeps, where the schedule cuts caches."""
        self.branches: list[Branch] = []
        """Side branches, in the order in which passes made them."""
        self.tails: dict[str, fx.Node] = {}
        """By name: places [B, n] of the last tokens of a segment, which caches of convolutions keep."""
        self.states: dict[int, tuple[fx.Node, fx.Node]] = {}
        """By layer: what a recurrent layer keeps behind its tokens, the last inputs of its convolution and its state."""
        self.placed: tuple[torch.device, ...] = ()
        """The device of each layer, once a pass has placed them; none where all of the program is on one."""
        self.effects: set[fx.Node] = set()
        """Nodes that write to a buffer: never dead, whoever uses them."""
        self.specs: dict[str, InputSpec] = {}
        """Declared inputs by name."""
        self._shapes: dict[str, Any] = {}
        self._lengths: dict[str, Size] = {}
        embeds = self.placeholder_named("inputs_embeds").meta["val"]
        self.batch, self.tokens = self.length("batch"), self.length("tokens")
        self.width, self.dtype, self.device = embeds.shape[2], embeds.dtype, embeds.device
        self._fake_sources()
        found = PassResult(matched=len(self.regions))
        self._record("captured", {}, found, captured.seconds * 1e3)

    @property
    def name(self) -> str:
        """Its kind and what tells it from others of its kind, e.g. "decode-masked"."""
        return program_name(self.kind, self.variant)

    @property
    def differentiable(self) -> bool:
        """True if it is made for a backward."""
        return self.kind == "train" or self.variant.differentiable

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def inputs(self) -> list[str]:
        """Names of the tensors that the program takes, in order."""
        return [node.name for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def declared_inputs(self) -> tuple[InputSpec, ...]:
        """Specs of the inputs, in order.

        Raises:
            PassError: a captured input is still there that no pass replaced or declared.
        """
        for name in self.inputs:
            if name not in self.specs:
                raise PassError(f"nothing fills the input {name!r} of the {self.kind} program")
        return tuple(self.specs[name] for name in self.inputs)

    @property
    def outputs(self) -> dict[str, fx.Node]:
        """The program's outputs by name."""
        returned = self.graph.output_node().args[0]
        if isinstance(returned, fx.Node):
            return {"hidden": returned}
        return dict(returned)  # type: ignore[arg-type]

    def apply(self, pass_fn: Pass, **options: Any) -> PassResult:
        """Run one pass, check what every pass must leave intact, and record the graph.

        Raises:
            PassError: the pass returned no `PassResult`, or left the graph in a wrong state.
        """
        started, name = time.perf_counter(), pass_name(pass_fn)
        before = set(self.graph.nodes)
        result = pass_fn(self, self.plan, **options)
        if not isinstance(result, PassResult):
            raise PassError(
                f"the pass {name} returned {result!r}, a {type(result).__name__}; return "
                "hidrop_fx.PassResult(matched=number of places that it rewrote)"
            )
        lint(self, name)
        tidy(self)
        added = [node for node in self.graph.nodes if node not in before]
        for node in added:
            node.meta["hidrop_pass"] = name
        verify(self, name, added)
        self._record(name, options, result, (time.perf_counter() - started) * 1e3)
        return result

    # What passes build with.

    def placeholder_named(self, name: str) -> fx.Node:
        """Return an input of the program.

        Raises:
            PassError: it has none of that name.
        """
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        raise PassError(f"the graph has no input {name!r}; it has {', '.join(self.inputs)}")

    def length(self, name: str) -> Size:
        """Return the symbolic size of that name, made at first use."""
        if name not in self._lengths:
            self._lengths[name] = self.symbols.new(name)
        return self._lengths[name]

    def add_parameter(self, name: str, tensor: Tensor) -> fx.Node:
        """Add a tensor that every call reads, such as a weight of a custom pass.

        Raises:
            PassError: the program has something of that name.
        """
        if hasattr(self.module, name):
            raise PassError(f"the program has a {name!r} already; choose another name")
        if isinstance(tensor, nn.Parameter):
            self.module.register_parameter(name, tensor)
        else:
            self.module.register_buffer(name, tensor, persistent=False)
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.get_attr(name)
        self._fake_parameter(node)
        return node

    def add_input(self, spec: InputSpec) -> fx.Node:
        """Declare an input, and return its placeholder; an equal declaration returns it again.

        Raises:
            PassError: the name is taken by an input that another spec fills.
        """
        if spec.name in self.inputs:
            known = self.specs.get(spec.name)
            if known is None or known.declaration != spec.declaration:
                raise PassError(
                    f"the program has an input {spec.name!r} already; choose another name"
                )
            return self.placeholder_named(spec.name)
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(spec.name)
        shape = [self.length(dim) if isinstance(dim, str) else dim for dim in spec.dims]
        with self.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=spec.dtype, device=self.device)
        self.specs[spec.name] = spec
        return node

    def fill(self, name: str, fill: Callable[[Any], Tensor]) -> None:
        """Declare how calls fill an input that was captured."""
        value = self.placeholder_named(name).meta["val"]
        self.specs[name] = InputSpec(name, tuple(value.shape), value.dtype, fill)

    def call(
        self, function: Callable[..., Any], *args: Any, before: fx.Node, subgraph: str | None = None
    ) -> fx.Node:
        """Insert a call of plain tensor code before a node."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(function, args)
        node.meta["hidrop"] = function.__name__
        if subgraph is not None:
            self.subgraphs[node] = subgraph
        return node

    def copy_slice(
        self,
        wanted: list[fx.Node],
        given: Mapping[fx.Node, fx.Node],
        *,
        before: fx.Node,
        subgraph: str | None = None,
    ) -> dict[fx.Node, fx.Node]:
        """Copy what computes `wanted` from the nodes `given`, which the copy reads replaced.

        Raises:
            PassError: `wanted` also depends on something that is not given.
        """
        return copy_slice(self, wanted, given, before, subgraph)

    def segment_of(self, layer: int) -> SegmentNodes:
        """Return the tokens that are a layer's rows, by the plan and the events rewritten so far."""
        return [s for s in self.segments if s.start <= layer][-1]

    def segment(self, name: str) -> SegmentNodes:
        """Return the nodes of a planned segment.

        Raises:
            PassError: no pass has made it yet.
        """
        for segment in self.segments:
            if segment.name == name:
                return segment
        made = ", ".join(s.name for s in self.segments)
        raise PassError(f"the program has no segment {name!r} yet; it has {made or 'none'}")

    def parent_of(self, event: Event) -> SegmentNodes:
        """Return the tokens that an event changes."""
        parent = self.plan.opened_by(event).parent
        assert parent is not None
        return self.segment(parent)

    def enter(self, segment: SegmentNodes) -> None:
        """Let the layers from `segment.start` on see this token set."""
        for region in self.regions[segment.start :]:
            for live_in in region.live_ins.keys() & segment.live_ins.keys():
                region.read(region.live_ins[live_in], segment.live_ins[live_in])
                region.live_ins[live_in] = segment.live_ins[live_in]
        self.segments.append(segment)

    def returns(self, outputs: Mapping[str, fx.Node]) -> None:
        """Set what the program returns."""
        self.graph.output_node().args = (dict(outputs),)

    def describe(self, node: fx.Node) -> str:
        """Format a node for an error: name, shape by symbolic sizes, operator, module path."""
        return describe(node, self.symbols.name)

    def remove_unused_inputs(self) -> None:
        """Erase captured inputs that no rewritten layer reads any more."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users:
                self.specs.pop(node.name, None)
                self.graph.erase_node(node)

    # What the runner checks.

    def resized(self, value: Tensor, length: int, layer: int | None = None) -> Tensor:
        """Return an empty tensor of a captured value's shape in this program, for `length` tokens.

        Args:
            layer: on whose device; None for the value's own.
        """
        batch, tokens = self.captured.placeholders["inputs_embeds"].meta["val"].shape[:2]
        sizes = {str(batch): self.batch, str(tokens): length}
        shape = [sizes.get(str(size), size) for size in value.shape]
        with self.fake_mode:
            device = value.device if layer is None or not self.placed else self.placed[layer]
            return torch.empty(shape, dtype=value.dtype, device=device)

    def _fake_sources(self) -> None:
        """Move inputs and parameters from the shapes of capture to those of this program."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = self.resized(node.meta["val"], self.tokens)
            elif node.op == "get_attr":
                self._fake_parameter(node)

    def _fake_parameter(self, node: fx.Node) -> None:
        tensor = operator.attrgetter(str(node.target))(self.module)
        if is_distributed(tensor):
            tensor = plain_like(tensor._local_tensor)
        if is_quantised(tensor):
            node.meta["layout"] = layout(tensor)
            tensor = plain_like(tensor)
        node.meta["val"] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        placement = self.captured.placement
        if placement is not None and placement.spread and not self.placed:
            # Until `place_layers` has put copies in, all of the program is where it was traced.
            node.meta["val"] = node.meta["val"].to(placement.entry)

    def _record(
        self, name: str, options: Mapping[str, Any], result: PassResult, milliseconds: float
    ) -> None:
        names = {node: node.name for node in self.graph.nodes if node.op != "output"}
        stage = Stage(
            name=name,
            options=dict(options),
            result=result,
            milliseconds=milliseconds,
            recorded=GraphRecord(self.graph),
            kind=self.kind,
            layers={names[n]: r.layer for r in self.regions for n in r.nodes if n in names},
            paths=tuple(region.path for region in self.regions),
            live_outs=tuple(names[region.live_out] for region in self.regions),
            segments=tuple(
                StageSegment(
                    name=segment.name,
                    start=segment.start,
                    length=self.symbols.name(segment.length),
                    columns=None if segment.columns is None else names[segment.columns],
                )
                for segment in self.segments
            ),
            origins={names[n]: n.meta["hidrop_pass"] for n in names if "hidrop_pass" in n.meta},
            symbols=self.symbols,
            fake_mode=self.fake_mode,
            values=self._shapes,
        )
        self.history.append(stage)


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
