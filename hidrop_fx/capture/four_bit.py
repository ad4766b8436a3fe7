"""Layers of bitsandbytes with 4-bit weights: each product is one opaque node, as attention is.

    with recorded_products(decoder): export(decoder)     # Linear4bit(x) -> hidrop.linear_4bit(x, weight, bias, ...)
    call_four_bit(graph)                                 # its target becomes `hidrop_fx.ops.four_bit.linear_4bit`

The weight in the graph is the packed one, with all that bitsandbytes notes on it; adapters around such a layer are traced as
around any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.ops.four_bit import CAPTURED_LINEAR_4BIT, linear_4bit

_HOME, _NAME = "bitsandbytes.", "Linear4bit"


def is_four_bit(module: nn.Module) -> bool:
    """Return True for a layer of bitsandbytes itself, whatever adapters are around it."""
    return any(
        kind.__name__ == _NAME and f"{kind.__module__}.".startswith(_HOME)
        for kind in type(module).__mro__
    )


def wraps_four_bit(module: nn.Module) -> bool:
    """Return True for PEFT's layer around one of these."""
    inner = getattr(module, "base_layer", None)
    return isinstance(inner, nn.Module) and (is_four_bit(inner) or wraps_four_bit(inner))


def check_four_bit(path: str, module: Any) -> None:
    """Raise where a layer was not quantised yet.

    Raises:
        UnsupportedModelError: bitsandbytes packs the weight when it is moved, and it was not.
    """
    if getattr(module.weight, "quant_state", None) is None:
        raise UnsupportedModelError(
            f"{path} of the text decoder is a {_NAME} of bitsandbytes whose weight is not packed yet; move the model to its "
            "device before it is compiled: model.to('cpu') or model.to('cuda')"
        )


@contextmanager
def recorded_products(decoder: nn.Module) -> Iterator[None]:
    """Let 4-bit layers of a decoder record their products while it is traced."""
    layers = [module for module in decoder.modules() if is_four_bit(module)]
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(_record, layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


def _record(layer: Any, x: Tensor) -> Tensor:
    """Record a product; until a layer has noted another dtype it computes in that of its first input."""
    noted = layer.compute_type_is_set or x.dtype == torch.float16
    compute = layer.compute_dtype if noted else None
    recorded: Tensor = torch.ops.hidrop.linear_4bit(
        x, layer.weight, layer.bias, layer.out_features, compute
    )
    return recorded


def call_four_bit(graph: fx.Graph) -> None:
    """Put what computes it in the place of each recorded product."""
    for node in graph.nodes:
        if node.target is CAPTURED_LINEAR_4BIT:
            node.target = linear_4bit
