"""A graph as it is at one moment, kept without a copy of its nodes; the copy is made for those who look at it.

record = GraphRecord(graph)      # cheap: what each node holds now
...                              # the graph is rewritten, nodes are erased
record.graph()                   # a graph of its own, as the other was
"""

import copy
from typing import Any, NamedTuple

from torch import fx


class _NodeRecord(NamedTuple):
    node: fx.Node
    op: str
    target: Any
    args: tuple[Any, ...]
    """Names other nodes themselves. Containers in it never change: fx replaces them."""
    kwargs: dict[str, Any]
    name: str
    type: Any
    meta: dict[str, Any]


class GraphRecord:
    """The nodes of a graph, each with what it held when the record was made."""

    def __init__(self, graph: fx.Graph) -> None:
        *nodes, output = graph.nodes
        self._nodes = [
            _NodeRecord(n, n.op, n.target, n.args, n.kwargs, n.name, n.type, copy.copy(n.meta))
            for n in nodes
        ]
        self._returned = output.args[0]

    def __len__(self) -> int:
        """Count the nodes, the output among them."""
        return len(self._nodes) + 1

    def graph(self) -> fx.Graph:
        """Return a graph equal to the recorded one, by names too; a new one at each call."""
        made = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for held in self._nodes:
            args, kwargs = fx.map_arg((held.args, held.kwargs), copies.__getitem__)
            node = made.create_node(held.op, held.target, args, kwargs, held.name, held.type)
            node.meta = copy.copy(held.meta)
            copies[held.node] = node
        made.output(fx.map_arg(self._returned, copies.__getitem__))
        return made
