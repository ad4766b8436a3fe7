"""Quantised weights: tensor subclasses with a product of their own, as torchao's `quantize_` makes them.

    y = F.linear(x, weight)      # weight: torchao's Int8Tensor; its own code runs

Export would unfold such a weight into its parts and write out what it does. It is shown a plain
tensor in its place instead, and the captured graph calls `F.linear` of the weight itself: so the
subclass decides when the program runs, uncompiled or under torch.compile, and a layer's graph is
the same whatever its weights are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hidrop_fx.capture.four_bit import check_four_bit, is_four_bit, wraps_four_bit
from hidrop_fx.capture.parallel_styles import is_part
from hidrop_fx.errors import CaptureError, UnsupportedModelError

# Layers of bitsandbytes by name: its own of 4 bits aside, their weights are packed bytes of another shape, and
# code of their own prepares them at the first call, which a trace would freeze.
_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def is_quantised(tensor: object) -> bool:
    """Return True for a tensor that holds its values in other tensors and has a product of its own.

    The second is what a `DTensor` lacks: it takes part in the operators that a product is made of.
    """
    overrides = _torch_function(type(tensor)) not in (None, _torch_function(Tensor))
    return overrides and is_traceable_wrapper_subclass(tensor)


def _torch_function(kind: Any) -> Any:
    """Return the function behind `__torch_function__`; None where that is disabled."""
    return getattr(getattr(kind, "__torch_function__", None), "__func__", None)


@contextmanager
def plain_weights(module: nn.Module) -> Iterator[None]:
    """Show plain tensors of the same shape, dtype and device in place of quantised parameters."""
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
    """Return a plain tensor of its shape, dtype and device over one element of memory, for tracing."""
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
    """Return dtype, shape and device of a tensor, and those of the parts of a quantised one.

    Weights of equal layout may be arguments of the same compiled code.
    """
    text = f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}] {tensor.device}"
    if not is_traceable_wrapper_subclass(tensor):
        return text
    names, context = tensor.__tensor_flatten__()
    parts = ", ".join(f"{name}: {layout(getattr(tensor, name))}" for name in names)
    return f"{type(tensor).__module__}.{type(tensor).__qualname__} {text} ({parts}) {context}"


def check_weights(model: nn.Module, decoder: nn.Module) -> None:
    """Raise where weights are of a kind that is not captured.

    Args:
        decoder: the text decoder of `model`; outside it only distributed tensors are refused.

    Raises:
        UnsupportedModelError: names the first such weight, its class, and what to do instead.
    """
    for path, tensor in chain(model.named_parameters(), model.named_buffers()):
        known = not is_distributed(tensor) or _is_of_fsdp2(model, path) or is_part(model, path)
        if not known:
            raise UnsupportedModelError(
                f"{path} is a DTensor that neither fully_shard (FSDP2) nor from_pretrained with a tp_plan made, and "
                "hidrop_fx knows no other. Load the model with distributed_config=DistributedConfig(tp_plan='auto'), shard with "
                "torch.distributed.fsdp.fully_shard, train with DistributedDataParallel, "
                "or gather the weights (get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)) of torch.distributed.checkpoint.state_dict) and load them into a "
                "model that is not sharded"
            )
    for path, tensor in chain(decoder.named_parameters(), decoder.named_buffers()):
        if is_distributed(tensor):
            continue
        if is_traceable_wrapper_subclass(tensor) and not is_quantised(tensor):
            kind = type(tensor)
            raise UnsupportedModelError(
                f"{path} of the text decoder is a {kind.__module__}.{kind.__qualname__}, a tensor subclass "
                "without a __torch_function__ of its own; hidrop_fx captures plain tensors and those that "
                "override torch.nn.functional.linear, such as torchao's. Replace it by a plain tensor, or "
                "quantise with torchao.quantization.quantize_"
            )
    _refuse_bitsandbytes(decoder)


def _is_of_fsdp2(model: nn.Module, path: str) -> bool:
    return "_is_fsdp_managed_module" in model.get_submodule(path.rpartition(".")[0]).__dict__


def is_distributed(tensor: Tensor) -> bool:
    """Return True for a DTensor."""
    # By name: torch.distributed.tensor is slow to import, and absent from some builds.
    return any(
        kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")
        for kind in type(tensor).__mro__
    )


def _refuse_bitsandbytes(decoder: nn.Module) -> None:
    for path, module in decoder.named_modules():
        if is_four_bit(module):
            check_four_bit(path, module)
            continue
        if wraps_four_bit(module):  # which is among the modules too
            continue
        for kind in type(module).__mro__:
            if kind.__name__ in _BITSANDBYTES:
                raise UnsupportedModelError(
                    f"{path} of the text decoder is a {kind.__name__} of bitsandbytes, whose packed "
                    "weights hidrop_fx does not capture. Its own Linear4bit is captured; or quantise with torchao: load "
                    "without quantization_config and call torchao.quantization.quantize_(model, "
                    "Int8WeightOnlyConfig()), or load with TorchAoConfig; or call model.dequantize()"
                )
