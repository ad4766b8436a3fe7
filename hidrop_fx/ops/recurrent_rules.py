"""The rules by which a layer carries a state from token to token, by the node that stands for each in a graph."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from hidrop_fx.ops.recurrence import (
    CAPTURED_RECURRENCE,
    cached_recurrence,
    causal_recurrence,
    prompt_recurrence,
    recurrence_over,
)
from hidrop_fx.ops.state_space import (
    CAPTURED_SCAN,
    cached_scan,
    causal_scan,
    prompt_scan,
    scan_over,
)

CAPTURED_RULES = (CAPTURED_RECURRENCE, CAPTURED_SCAN)


class Rule(NamedTuple):
    """What takes the place of a captured recurrence; each is given the arguments of the captured node, then its own."""

    causal: Callable[..., Tensor]
    """From an empty state, which nobody reads behind the tokens."""
    prompt: Callable[..., tuple[Tensor, Tensor]]
    """As before, with columns and a table that tells padding; and the state behind each row's last token."""
    over: Callable[..., tuple[Tensor, Tensor]]
    """Behind a state, with the order of real tokens and their counts; and the state then."""
    cached: Callable[..., Tensor]
    """As before, the state written in its place."""
    state: Callable[[Sequence[Any], Sequence[Any]], tuple[int, int, int]]
    """From the shapes of keys and values: [heads, rows, columns] of a state."""


_DELTA = Rule(
    causal_recurrence,
    prompt_recurrence,
    recurrence_over,
    cached_recurrence,
    lambda key, value: (value[1], key[3], value[3]),
)
_SPACE = Rule(
    causal_scan,
    prompt_scan,
    scan_over,
    cached_scan,
    lambda key, value: (value[1], value[3], key[3]),
)
_RULES: dict[Any, Rule] = {
    CAPTURED_RECURRENCE: _DELTA,
    causal_recurrence: _DELTA,
    CAPTURED_SCAN: _SPACE,
    causal_scan: _SPACE,
}


def rule_of(node: fx.Node) -> Rule:
    """Return the rule of a captured recurrence, or of what runs in its place from an empty state."""
    return _RULES[node.target]
