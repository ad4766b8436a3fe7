"""The steps in front of the first layer, which every stream takes on its own.

hidden = entry.insert(embeds, graph, before=node)      # Granite: embeds * embedding_multiplier
"""

from collections.abc import Collection

from torch import fx

from hidrop_fx.capture.regions import embeddings_of


class Entry:
    """A decoder's function from embeddings to what its first layer reads; most have none."""

    def __init__(self, graph: fx.Graph, hidden: fx.Node) -> None:
        """Copy the steps that compute `hidden` from a captured graph's `inputs_embeds`."""
        self._source = embeddings_of(graph)
        own = fx.Graph()
        copies = {self._source: own.node_copy(self._source)}
        for node in backward([hidden], {self._source}):
            copies[node] = own.node_copy(node, copies.__getitem__)
        self._source, *self._steps = copies.values()

    def insert(self, embeds: fx.Node, graph: fx.Graph, *, before: fx.Node) -> fx.Node:
        """Insert the steps for other embeddings into a graph, and return the last of them."""
        copies = {self._source: embeds}
        for step in self._steps:
            with graph.inserting_before(before):
                copies[step] = graph.node_copy(step, copies.__getitem__)
        return copies[self._steps[-1]] if self._steps else embeds

    def erase(self, hidden: fx.Node, graph: fx.Graph) -> None:
        """Erase the captured steps once nothing reads them; a dropout would stay, as if it wrote somewhere."""
        for node in reversed(backward([hidden], [])):
            if node.op == "call_function" and not node.users:
                graph.erase_node(node)


def backward(wanted: Collection[fx.Node], given: Collection[fx.Node]) -> list[fx.Node]:
    """Return the nodes that `wanted` is computed from, down to `given`, in graph order."""
    found: set[fx.Node] = set()
    pending = [n for n in wanted if n not in given]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [n for n in node.all_input_nodes if n not in given]
    return sorted(found)
