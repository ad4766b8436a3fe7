"""Write rotary embeddings by complex numbers, as Llama 4 has them, with their real and imaginary parts.

Before:  %polar = polar(%ones, %angles) ; %q = view_as_complex(%pairs) ; %mul = mul(%q, %polar)
         %rotated = view_as_real(%mul)
After:   %polar = stack([%ones * cos(%angles), %ones * sin(%angles)], -1)            # [..., 2]
         %rotated = stack([%a * %c - %b * %d, %a * %d + %b * %c], -1)

Compilers have no code for complex numbers, and one value is a side that passes gather like any other.
"""

import logging
from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import describe

logger = logging.getLogger("hidrop_fx")

_aten = torch.ops.aten
_CASTS = (
    _aten.to.dtype_layout,
    _aten.to.dtype,
    _aten.to.device,
    _aten._to_copy.default,
)
_PER_ELEMENT = (_aten.unsqueeze.default, _aten.slice.Tensor, _aten.alias.default)
_CONVERTED = (_aten.polar.default, _aten.view_as_complex.default, _aten.view_as_real.default)


def erase_idle_casts(graph: fx.Graph) -> None:
    """Take out casts to the dtype and device that a value has.

    A trace hands on their result in the place of the value, so that one layer's would be read by all others.
    """
    for node in list(graph.nodes):
        if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
            continue
        before, after = node.args[0].meta.get("val"), node.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            continue
        alike = (before.dtype, before.device, before.layout) == (
            after.dtype,
            after.device,
            after.layout,
        )
        if alike and before.is_complex():
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def make_real(graph: fx.Graph) -> None:
    """Replace complex values by their real and imaginary parts, in a last dimension of two.

    All of them, or none with a line in the log, where an operator on them is not one of a rotary embedding's.
    """
    other = next((n for n in graph.nodes if _reads_or_is_complex(n) and not _is_known(n)), None)
    if other is not None:
        logger.info(
            "%s computes with complex numbers in a way that is none of a rotary embedding's: they stay, and compilers "
            "have no code of their own for them",
            describe(other),
        )
        return
    parts: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if _reads_or_is_complex(node):
            _Writer(graph, node, parts).write()
    for node in reversed(list(parts)):
        graph.erase_node(node)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _reads_or_is_complex(node: fx.Node) -> bool:
    return _is_complex(node) or any(map(_is_complex, node.all_input_nodes))


def _is_known(node: fx.Node) -> bool:
    """Return True for an operator that `_Writer` writes."""
    if node.target in _PER_ELEMENT:
        dim = node.args[1] if len(node.args) > 1 else 0
        return isinstance(dim, int) and dim >= 0  # counted from the front, whatever comes behind
    if node.target is _aten.mul.Tensor:
        return not any(isinstance(factor, complex) for factor in node.args)
    return node.target in _CONVERTED


class _Writer:
    """Writes one node on complex values as nodes on real ones, in front of it."""

    def __init__(self, graph: fx.Graph, node: fx.Node, parts: dict[fx.Node, fx.Node]) -> None:
        self._graph, self._node, self._parts = graph, node, parts

    def write(self) -> None:
        node = self._node
        with self._graph.inserting_before(node):
            if node.target is _aten.polar.default:
                size, angle = node.args
                parts = [
                    self._call(_aten.mul.Tensor, size, self._call(f, angle))
                    for f in (_aten.cos.default, _aten.sin.default)
                ]
                self._parts[node] = self._stack(*parts)
            elif node.target is _aten.view_as_complex.default:
                self._parts[node] = node.args[0]  # type: ignore[assignment]
            elif node.target is _aten.view_as_real.default:
                node.replace_all_uses_with(self._parts[node.args[0]])  # type: ignore[index]
                self._graph.erase_node(node)
            elif node.target is _aten.mul.Tensor:
                self._parts[node] = self._product(*node.args)
            else:
                source, *rest = node.args
                self._parts[node] = self._call(node.target, self._parts[source], *rest)  # type: ignore[index]

    def _product(self, first: Any, second: Any) -> fx.Node:
        known = [self._parts.get(n) if isinstance(n, fx.Node) else None for n in (first, second)]
        if None in known:
            scaled, factor = (known[0], second) if known[0] is not None else (known[1], first)
            if isinstance(factor, fx.Node) and factor.meta["val"].dim():
                factor = self._call(_aten.unsqueeze.default, factor, -1)
            return self._call(_aten.mul.Tensor, scaled, factor)
        (a, b), (c, d) = ([self._call(_aten.select.int, n, -1, k) for k in (0, 1)] for n in known)
        times = lambda x, y: self._call(_aten.mul.Tensor, x, y)  # noqa: E731
        real = self._call(_aten.sub.Tensor, times(a, c), times(b, d))
        return self._stack(real, self._call(_aten.add.Tensor, times(a, d), times(b, c)))

    def _stack(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        return self._call(_aten.stack.default, [real, imaginary], -1)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        made = self._graph.call_function(target, args)
        values = fx.map_arg(args, lambda given: given.meta["val"])
        mode: Any = next(v for v in _tensors(values)).fake_mode  # type: ignore[attr-defined]
        with mode:
            made.meta["val"] = target(*values)
        for name in ("nn_module_stack", "stack_trace"):
            if name in self._node.meta:
                made.meta[name] = self._node.meta[name]
        return made


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]
