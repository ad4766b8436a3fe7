"""Write an exported graph's in-place operators as functions of what they write to.

Before:  %select = select(%freqs, 0, 0) ; %slice = slice(%select, 2, 1, 9, 3)
         %copy_ = copy_(%slice, %values) ; %cos = cos(%select)
After:   %copy = copy(%slice, %values)
         %scatter = slice_scatter(%select, %copy, 2, 1, 9, 3) ; %freqs_1 = select_scatter(%freqs, %scatter, 0, 0)
         %cos = cos(%scatter)

A *root* is a tensor that memory was made for; views of it, and views of those, share its memory. A write makes a new value
of the root, and a view that is read later is taken anew. torch's functionalisation does the same by tracing the decoder a
second time, which takes as long as the export; what is not known here is left to it.
"""

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

_ATEN = torch.ops.aten
# What puts a new value of a view into its base: (base, value, *the other arguments of the view).
_SCATTERS: dict[Any, OpOverload] = {
    _ATEN.slice.Tensor: _ATEN.slice_scatter.default,
    _ATEN.select.int: _ATEN.select_scatter.default,
}
# Views that never are copies, and can be taken anew of a new value.
_VIEWS = frozenset(
    (
        *(*_SCATTERS, operator.getitem, _ATEN.unbind.int, _ATEN.split.Tensor, _ATEN.chunk.default),
        *(_ATEN.transpose.int, _ATEN.permute.default, _ATEN.view.default),
        *(_ATEN.unsqueeze.default, _ATEN.expand.default, _ATEN.alias.default),
    )
)
# Composites that never return an input, as dropout in evaluation does.
_MAKE_MEMORY = frozenset((_ATEN.linear.default, _ATEN.matmul.default))


class _UnknownError(Exception):
    """The graph writes in a way that only torch's functionalisation knows."""


def is_write(node: fx.Node) -> bool:
    """Return True for an operator that writes to one of its inputs."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def write_as_functions(graph: fx.Graph) -> bool:
    """Replace all in-place operators of an exported graph.

    Returns:
        False if one of them writes in a way that is not known here; nothing was replaced then.
    """
    try:
        written = dict.fromkeys(_root_of(node) for node in graph.nodes if is_write(node))
        memories = [_Memory(root, graph) for root in written]
    except _UnknownError:
        return False
    of = {node: memory for memory in memories for node in memory.bases}
    for node in list(graph.nodes):
        for read in node.all_input_nodes:
            if read in of:
                node.replace_input_with(read, of[read].value(read, node))
        if node in of:
            of[node].meet(node)
    for node in reversed(graph.nodes):
        if is_write(node):
            graph.erase_node(node)
    return True


class _Memory:
    """What shares the memory of one root, and its values, as the nodes of a graph are met in their order.

    Attributes:
        bases: the root, views and what in-place operators return, each with the node whose memory it is.
    """

    def __init__(self, root: fx.Node, graph: fx.Graph) -> None:
        """Find what shares the memory.

        Raises:
            _UnknownError: that cannot be told, or a write cannot be put into the root.
        """
        self.bases: dict[fx.Node, fx.Node] = {root: root}
        self._version = 0
        self._values: dict[fx.Node, tuple[int, fx.Node]] = {root: (0, root)}
        pending: list[fx.Node] = []
        for node in graph.nodes:
            base = _base_of(node)
            if base in self.bases:
                self.bases[node] = base
            if is_write(node) and node in self.bases:
                # What may be a copy is one of the old value; written or not, it cannot be taken anew.
                if not all(map(_is_clear, pending)):
                    raise _UnknownError
                _function_of(node)
            if any(read in self.bases for read in node.all_input_nodes):
                pending.append(node)

    def value(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """Return the value of the root or of a view where a node reads it, made there if it was written to since."""
        version, found = self._values[node]
        if version == self._version:
            return found
        base = self.value(self.bases[node], before)
        if is_write(node):
            found = base
        else:
            with before.graph.inserting_before(before):
                found = before.graph.node_copy(node, lambda n: base if n is node.args[0] else n)
        self._values[node] = self._version, found
        return found

    def meet(self, node: fx.Node) -> None:
        """Note a view that reads the newest value of its base, or put what a node writes into the root."""
        if not is_write(node):
            self._values[node] = self._version, node
            return
        with node.graph.inserting_before(node):
            made = node.graph.call_function(_function_of(node), node.args, node.kwargs)
        target = self.bases[node]
        made.meta = {**node.meta, "val": target.meta["val"]}
        self._put(target, made, node)
        self._values[node] = self._version, made

    def _put(self, node: fx.Node, value: fx.Node, before: fx.Node) -> None:
        base = self.bases[node]
        if base is node:
            self._version += 1
        elif _is_whole(node):
            self._put(base, value, before)
        else:
            args = self.value(base, before), value, *node.args[1:]
            with before.graph.inserting_before(before):
                scattered = before.graph.call_function(_SCATTERS[node.target], args, node.kwargs)
            scattered.meta = {**before.meta, "val": base.meta["val"]}
            self._put(base, scattered, before)
        self._values[node] = self._version, value


def _root_of(write: fx.Node) -> fx.Node:
    """Return the tensor that memory was made for, of which a node writes a part or all."""
    node = write
    while (base := _base_of(node)) is not None:
        if not _is_whole(node) and node.target not in _SCATTERS:
            raise _UnknownError
        node = base
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node) or source.target in _VIEWS or not _is_clear(source):
        raise _UnknownError
    return node


def _base_of(node: fx.Node) -> fx.Node | None:
    """Return the node of which a node is a view, or what it writes to; None if memory is made for it."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0] if _base_of(node.args[0]) is not None else None
    if not isinstance(node.target, OpOverload):
        return None
    schema = node.target._schema
    shared = any(value.alias_info is not None for value in schema.returns)
    base = node.args[0] if node.args else None
    return base if shared and isinstance(base, fx.Node) else None


def _is_whole(node: fx.Node) -> bool:
    """Return True for what is all of its base."""
    return is_write(node) or node.target is _ATEN.alias.default


def _is_clear(node: fx.Node) -> bool:
    """Return True if an operator surely makes memory, or surely does not: a view that is no copy, a write."""
    target = node.target
    if target in _VIEWS or target in _MAKE_MEMORY or is_write(node):
        return True
    if not isinstance(target, OpOverload) or _base_of(node) is not None:
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )


def _function_of(write: fx.Node) -> OpOverload:
    """Return the operator that computes what an in-place operator writes to its first input."""
    target = write.target
    assert isinstance(target, OpOverload)
    name, arguments = target._schema.name.partition("::")[2], target._schema.arguments
    writes_more = any(a.alias_info is not None and a.alias_info.is_write for a in arguments[1:])
    if writes_more or torch.Tag.inplace_view in target.tags:
        raise _UnknownError
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if not name.endswith("_") or found is None or found._schema.is_mutable:
        raise _UnknownError
    if [a.name for a in found._schema.arguments] != [a.name for a in arguments]:
        raise _UnknownError
    values = [n.meta.get("val") for n in write.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    if torch.Tag.pointwise in found.tags and len(dtypes) > 1:  # it would return the wider dtype
        raise _UnknownError
    return found
