"""Weights that know how to be multiplied: tensor subclasses, as torchao's `quantize_` makes them.

    y = F.linear(x, weight)      # weight: torchao's Int8Tensor; its own code runs

Export would unfold such a weight into its parts and write out what it does. It is shown a plain
tensor in its place instead, and the captured graph calls `F.linear` of the weight itself: so the
subclass decides when the program runs, uncompiled or under torch.compile, and a layer's graph is
the same whatever its weights are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hidrop_fx.errors import CaptureError, UnsupportedModelError

# Layers of bitsandbytes, and PEFT's around them. Their weights are packed bytes of another shape, and
# code of their own prepares them at the first call, which a trace would freeze.
_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def is_quantised(tensor: object) -> bool:
    """Whether a tensor is a subclass that holds its values in other tensors."""
    return is_traceable_wrapper_subclass(tensor)


@contextmanager
def plain_weights(module: nn.Module) -> Iterator[None]:
    """Put plain tensors of the same shape, dtype and device in the place of quantised parameters."""
    owners = [
        (owner._parameters, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_quantised(parameter)
    ]
    shown = {id(p): nn.Parameter(plain_like(p), requires_grad=False) for *_, p in owners}
    try:
        for parameters, name, parameter in owners:
            parameters[name] = shown[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in owners:
            parameters[name] = parameter


def plain_like(tensor: Tensor) -> Tensor:
    """A plain tensor of its shape, dtype and device, over one element of memory: for tracing alone."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def call_linear(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
    """Let quantised weights take part in products by `F.linear`, which they override.

    `aten.linear` would be taken apart before they are asked.

    Raises:
        CaptureError: the model's code does something else with such a weight.
    """
    for node in graph.find_nodes(op="get_attr"):
        weight = tensors[str(node.target)]
        if not is_quantised(weight):
            continue
        for user in node.users:
            if user.target is not torch.ops.aten.linear.default or user.args[1] is not node:
                raise CaptureError(
                    f"{node.target} is a {type(weight).__name__}, which {user.name} [{user.target}] "
                    "reads; hidrop_fx carries quantised weights of linear layers alone. Leave this "
                    "one out, by the filter_fn of torchao's quantize_"
                )
            user.target = torch.nn.functional.linear


def layout(tensor: Tensor) -> str:
    """Everything but the values: dtype, shape and device, and those of the parts of a quantised one.

    Weights of equal layout may be arguments of the same compiled code.
    """
    text = f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}] {tensor.device}"
    if not is_traceable_wrapper_subclass(tensor):
        return text
    names, context = tensor.__tensor_flatten__()
    parts = ", ".join(f"{name}: {layout(getattr(tensor, name))}" for name in names)
    return f"{type(tensor).__module__}.{type(tensor).__qualname__} {text} ({parts}) {context}"


def refuse_bitsandbytes(decoder: nn.Module) -> None:
    """Raise `UnsupportedModelError` where the text decoder holds layers of bitsandbytes."""
    for path, module in decoder.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _BITSANDBYTES:
                raise UnsupportedModelError(
                    f"{path} of the text decoder is a {kind.__name__} of bitsandbytes, whose packed "
                    "weights hidrop_fx does not capture. Quantise with torchao instead: load "
                    "without quantization_config and call torchao.quantization.quantize_(model, "
                    "Int8WeightOnlyConfig()), or load with TorchAoConfig; or call model.dequantize()"
                )
