"""Find the nodes of each decoder layer in a captured graph.

A *region* is the set of nodes whose `nn_module_stack` names one decoder layer. Its *live-ins* are the
values it reads from outside, parameters aside: the hidden states, and those that every layer shares
(RoPE's cos and sin, a mask). Its one *live-out* is the next layer's hidden states. Nothing is
recognised by shape or width. What a decoder does to `inputs_embeds` before its first layer is no part of
any: it is a function of single tokens.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx

from hidrop_fx.errors import CaptureError
from hidrop_fx.ops.attention import CAPTURED_ATTENTION
from hidrop_fx.ops.convolution import CAPTURED_CONVOLUTION, ConvolutionArguments
from hidrop_fx.ops.recurrent_rules import CAPTURED_RULES, rule_of


class KVShape(NamedTuple):
    """Sizes of a layer's keys [B, heads, S, key_width] and values [B, heads, S, value_width].

    Of a convolution, the halves of what it reads.
    """

    heads: int
    key_width: int
    value_width: int


class StateShape(NamedTuple):
    """Sizes of what a recurrent layer keeps in the place of keys and values: a state [B, heads, rows, columns] in fp32,
    and the inputs [B, 1, kernel, channels] of its short convolution.
    """

    heads: int
    rows: int
    columns: int
    kernel: int
    channels: int


@dataclass(kw_only=True)
class Region:
    """One decoder layer of a graph; passes keep its fields true to the graph as they rewrite it."""

    layer: int
    path: str
    """Module path, e.g. "layers.3"."""
    nodes: list[fx.Node]
    hidden: fx.Node
    """The hidden states it reads."""
    live_ins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Captured live-in -> the node that stands for it in the layer's segment."""
    live_out: fx.Node
    attention: fx.Node
    """The node in which its tokens see others: an attention, a convolution, or a recurrence; its live-out where none does."""
    is_convolution: bool = False
    is_tokenwise: bool = False
    """Each of its tokens is computed for itself."""
    kv_shape: "KVShape"
    """Sizes of its keys and values as captured."""
    convolution: fx.Node | None = None
    """The short convolution in front of a recurrence."""
    recurrence: fx.Node | None = None
    """The recurrence: its `attention`, or what stands beside it."""
    state_shape: "StateShape | None" = None
    """Sizes of what it keeps where it has a recurrence."""
    state_entry: int | None = None
    """Which entry of a cache that is: the layer's own, or behind those of all layers where it attends, too."""

    @property
    def keeps_state(self) -> bool:
        """True if a state goes from token to token, in the place of attention or beside it."""
        return self.recurrence is not None

    @property
    def is_recurrent(self) -> bool:
        """True if a state takes the place of attention."""
        return self.recurrence is self.attention

    @property
    def attends(self) -> bool:
        """True if its tokens see others in an attention."""
        return not (self.is_convolution or self.is_recurrent or self.is_tokenwise)

    def read(self, old: fx.Node, new: fx.Node) -> None:
        """Make the nodes of this region, and only they, read `new` in place of `old`."""
        for node in self.nodes:
            node.replace_input_with(old, new)


def find_regions(
    graph: fx.Graph, layers: str, num_layers: int, tokenwise: Collection[int] = ()
) -> list[Region]:
    """Return the regions of all decoder layers, in order; the graph stays as it is.

    Args:
        tokenwise: layers whose tokens see no others.

    Raises:
        CaptureError: a layer is missing, or does not have the shape described above; the message
            names the node, its module path and its shape.
    """
    regions: list[Region] = []
    members = nodes_of_layers(graph, layers, num_layers)
    hidden = layer_input(graph, members[0])
    for layer, nodes in enumerate(members):
        region = _region(layer, f"{layers}.{layer}", nodes, hidden, layer in tokenwise)
        regions.append(region)
        hidden = region.live_out
    both = [region for region in regions if region.keeps_state and region.attends]
    for entry, region in enumerate(both, start=num_layers):
        region.state_entry = entry
    return regions


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module whose code made this node, "" for the root or for glue."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def describe(node: fx.Node, size_name: Callable[[Any], str] = str) -> str:
    """Format a node for an error: name, shape, operator, module path, source line.

    Args:
        size_name: gives a size of the shape its name.
    """
    value = node.meta.get("val")
    shape = ""
    if isinstance(value, Tensor):
        shape = f" ({', '.join(size_name(size) for size in value.shape)})"
    path = module_path(node)
    where = f" in {path}" if path else ""
    source = (node.meta.get("stack_trace") or "").strip().splitlines()
    line = f" ({source[-2].strip()})" if len(source) > 1 else ""
    return f"{node.name}{shape} [{node.target}]{where}{line}"


def tensor_inputs(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the live-ins of a set of nodes, in order of first use, parameters aside."""
    inside = set(nodes)
    outside: dict[fx.Node, None] = {}
    for node in sorted(inside):
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr":
                outside[source] = None
    return list(outside)


def nodes_of_layers(graph: fx.Graph, layers: str, num_layers: int) -> list[list[fx.Node]]:
    """Return the nodes of each decoder layer, in graph order.

    Raises:
        CaptureError: a layer has none.
    """
    members = layers_in(graph, layers)
    missing = [k for k in range(num_layers) if k not in members]
    if missing:
        raise CaptureError(
            f"the captured graph holds no node of {layers}.{missing[0]} ({len(members)} of "
            f"{num_layers} layers found); a layer that is skipped or rewritten by hooks cannot be "
            "compiled"
        )
    return [members[layer] for layer in range(num_layers)]


def layers_in(graph: fx.Graph, layers: str) -> dict[int, list[fx.Node]]:
    """Return the nodes of the decoder layers that a graph holds, in graph order, by layer."""
    pattern = re.compile(rf"(?:^|\.){re.escape(layers)}\.(\d+)(?:\.|$)")
    members: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if found := pattern.search(module_path(node)):
            members.setdefault(int(found.group(1)), []).append(node)
    return members


def embeddings_of(graph: fx.Graph) -> fx.Node:
    """Return the input `inputs_embeds` of a captured graph."""
    return next(n for n in graph.nodes if n.op == "placeholder" and n.name == "inputs_embeds")


def layer_input(graph: fx.Graph, first: list[fx.Node]) -> fx.Node:
    """Return the hidden states that the first layer of a captured graph reads: the embeddings, or what
    the decoder makes of them.

    Args:
        first: nodes of that layer.
    """
    embeds = embeddings_of(graph)
    read = tensor_inputs(first)
    made = _made_of(embeds, read)
    return made[0] if embeds not in read and len(made) == 1 else embeds


def _made_of(source: fx.Node, nodes: list[fx.Node]) -> list[fx.Node]:
    """Select the nodes of the shape of `source` that its values, and not its sizes alone, flow into."""
    reached, pending = {source}, [source]
    while pending:
        for user in pending.pop().users:
            if user not in reached and isinstance(user.meta.get("val"), Tensor):
                reached.add(user)
                pending.append(user)
    # As text: to compare symbolic sizes is to decide on them.
    shape = str(source.meta["val"].shape)
    return [n for n in nodes if n in reached and str(n.meta["val"].shape) == shape]


def live_out_of(path: str, nodes: list[fx.Node], *, numbers: bool = False) -> fx.Node:
    """Return the one value that the nodes of a layer hand on.

    Args:
        numbers: sizes may be handed on beside it.

    Raises:
        CaptureError: there is none, or more than one, or it is no tensor.
    """
    inside = set(nodes)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    if numbers:
        outputs = [n for n in outputs if isinstance(n.meta.get("val"), Tensor)]
    tensors = [n for n in outputs if isinstance(n.meta.get("val"), Tensor)]
    if len(tensors) != 1 or len(outputs) != 1:
        found = ", ".join(map(describe, outputs)) or "none"
        raise CaptureError(
            f"{path} must hand on one value, its hidden states, but hands on {len(outputs)}: {found}; "
            "a decoder whose layers exchange more cannot be split at them"
        )
    return tensors[0]


def _region(
    layer: int, path: str, nodes: list[fx.Node], hidden: fx.Node, tokenwise: bool
) -> Region:
    sources = tensor_inputs(nodes)
    for source in sources:
        if not isinstance(source.meta.get("val"), Tensor):
            raise CaptureError(
                f"{path} reads the size {describe(source)} from outside; call "
                "hidrop_fx.capture.normalise.normalise before"
            )
    if hidden not in sources:
        raise CaptureError(
            f"{path} does not read the hidden states of the layer before it, {describe(hidden)}; "
            f"it reads {', '.join(map(describe, sources))}"
        )
    attention, convolution, recurrence = _mixing(path, nodes, tokenwise)
    live_out, kv_shape = live_out_of(path, nodes), KVShape(0, 0, 0)
    if attention is not None:
        keys, values = (node.meta["val"].shape for node in attention.args[1:3])  # type: ignore[union-attr]
        kv_shape = KVShape(keys[1], keys[-1], values[-1])
    return Region(
        layer=layer,
        path=path,
        nodes=nodes,
        hidden=hidden,
        live_ins={live_in: live_in for live_in in sources if live_in is not hidden},
        live_out=live_out,
        attention=attention or live_out,
        is_convolution=attention is not None and attention.target is CAPTURED_CONVOLUTION,
        is_tokenwise=attention is None,
        kv_shape=kv_shape,
        convolution=convolution,
        recurrence=recurrence,
        state_shape=_state_shape(recurrence, convolution),
        state_entry=None if recurrence is None else layer,
    )


def _mixing(
    path: str, nodes: list[fx.Node], tokenwise: bool
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
    """Return the node in which a layer's tokens see others, and its recurrence with the convolution in front of it."""
    attentions, convolutions, recurrences = (
        [n for n in nodes if n.target in kinds]
        for kinds in ((CAPTURED_ATTENTION,), (CAPTURED_CONVOLUTION,), CAPTURED_RULES)
    )
    counts = len(attentions), len(convolutions), len(recurrences)
    if counts == (0, 0, 0) and tokenwise:
        return None, None, None
    if counts in ((1, 0, 0), (0, 1, 0)):
        return [*attentions, *convolutions][0], None, None
    if counts in ((0, 1, 1), (1, 1, 1)) and convolutions[0] < recurrences[0]:
        return [*attentions, *recurrences][0], convolutions[0], recurrences[0]
    raise CaptureError(
        f"{path} holds {sum(counts) - counts[1] * bool(counts[2])} attentions, not one; its attention must go through "
        "transformers' AttentionInterface (`config._attn_implementation`), or be a short convolution alone, or one "
        "in front of a gated delta rule or a state space"
    )


def _state_shape(recurrence: fx.Node | None, convolution: fx.Node | None) -> StateShape | None:
    if recurrence is None or convolution is None:
        return None
    key, value = (node.meta["val"].shape for node in recurrence.args[1:3])  # type: ignore[union-attr]
    weight = ConvolutionArguments.of(convolution).weight.meta["val"].shape
    return StateShape(*rule_of(recurrence).state(key, value), weight[2], weight[0])
