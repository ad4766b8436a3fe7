"""Give a captured graph's causal convolutions over tokens the form that passes know.

Before:  %conv1d = conv1d(%x, %weight, %bias, [1], [K - 1], [1], D) ; %slice = slice(%conv1d, 2, 0, %length)
After:   %states = unsqueeze(transpose(%x, 1, 2), 1)
         %convolution = hidrop.convolution(%states, %states[..., :D/2], %states[..., D/2:], %weight, %bias)
         %slice = transpose(squeeze(%convolution, 1), 1, 2)

A convolution of another kind mixes tokens in a way that no pass would follow, and is refused.
"""

from typing import Any

import torch
from torch import fx

from hidrop_fx.capture.regions import describe
from hidrop_fx.errors import CaptureError
from hidrop_fx.ops.convolution import CAPTURED_CONVOLUTION

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv1d.padding, _aten.convolution.default)
# Arguments behind the weight, by their defaults.
_DEFAULTS: tuple[Any, ...] = (None, [1], [0], [1], 1)


def mark_convolutions(graph: fx.Graph) -> None:
    """Replace each depthwise causal convolution by one opaque node.

    Raises:
        CaptureError: there is a convolution of another kind.
    """
    for node in list(graph.nodes):
        if node.target in _CONVOLUTIONS:
            _replace(graph, node, _ends(node))


def _ends(node: fx.Node) -> list[fx.Node]:
    """Return the slices that leave a causal convolution's tokens as many as they were."""
    source, weight, *given = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    _, stride, padding, dilation, groups = (*given, *_DEFAULTS[len(given) :])[:5]
    channels, width = weight.meta["val"].shape[0], weight.meta["val"].shape[-1]
    length = source.meta["val"].shape[-1]
    causal = (
        node.target is _aten.conv1d.default
        and weight.meta["val"].shape[1] == 1
        and (list(stride), list(padding), list(dilation), groups)
        == ([1], [width - 1], [1], channels)
    )
    cut = [user for user in node.users if _is_head(user, length)]
    if not causal or len(cut) != len(node.users):
        raise CaptureError(
            f"{describe(node)} is no causal convolution of each channel for itself, cut to the tokens that it "
            "was given: it mixes tokens in a way that hidrop_fx cannot follow where a schedule takes some out"
        )
    return cut


def _is_head(node: fx.Node, length: Any) -> bool:
    """Return True for a slice [:, :, :length]."""
    if node.target is not _aten.slice.Tensor or node.args[1] != 2 or len(node.args) != 4:
        return False
    end = node.args[3]
    size = end.meta.get("val") if isinstance(end, fx.Node) else end
    # As text: to compare symbolic sizes is to decide on them.
    return node.args[2] in (None, 0) and str(size) == str(length)


def _replace(graph: fx.Graph, node: fx.Node, cut: list[fx.Node]) -> None:
    source, weight, *rest = node.args
    bias = rest[0] if rest else None
    assert isinstance(source, fx.Node)

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        values = fx.map_arg(args, lambda given: given.meta["val"])
        with source.meta["val"].fake_mode:
            made.meta["val"] = target(*values)
        for name in ("nn_module_stack", "stack_trace"):
            if name in node.meta:
                made.meta[name] = node.meta[name]
        return made

    width = source.meta["val"].shape[1]
    with graph.inserting_before(node):
        states = call(_aten.unsqueeze.default, call(_aten.transpose.int, source, 1, 2), 1)
        halves = [
            call(_aten.slice.Tensor, states, 3, *ends)
            for ends in ((0, width // 2), (width // 2, width))
        ]
        found = call(CAPTURED_CONVOLUTION, states, *halves, weight, bias)
        out = call(_aten.transpose.int, call(_aten.squeeze.dim, found, 1), 1, 2)
    for old in (*cut, node):
        old.replace_all_uses_with(out)
        graph.erase_node(old)
