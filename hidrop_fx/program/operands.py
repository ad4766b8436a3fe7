"""Operands of a node as text: a key that calls share whose operands are alike.

operand_text(node, lambda n: "%3")      # "((%3, -1), {'dim': 2})"
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx


def operand_text(node: fx.Node, text: Callable[[fx.Node], str]) -> str:
    """Return args and kwargs of a node as text, with `text(n)` in place of each node n in them."""
    operands: Any = fx.map_arg((node.args, node.kwargs), lambda n: _Verbatim(text(n)))  # type: ignore[arg-type, return-value]
    return str(operands)


@dataclass(frozen=True)
class _Verbatim:
    """Text that is its own repr, so that containers print it without quotes."""

    text: str

    def __repr__(self) -> str:
        return self.text
