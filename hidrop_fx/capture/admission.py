"""Look for what a graph cannot hold before a decoder is traced, and name it.

    check_capturable(model, decoder)        # at compile, and before each capture

Weights that are no plain tensors, hooks and wrappers, layers of quantisers and of PEFT: each kind is either
followed, as Hugging Face's own model would compute it, or refused here by its own name.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hidrop_fx.capture.adapters import check_adapters
from hidrop_fx.capture.hooks import check_hooks, described, function_of
from hidrop_fx.capture.layers import layer_list
from hidrop_fx.capture.placement import check_values, placement_of
from hidrop_fx.capture.quantised import check_weights
from hidrop_fx.capture.quantisers import check_quantisers
from hidrop_fx.capture.sharded import check_sharding, is_sharded
from hidrop_fx.capture.tensor_parallel import check_division
from hidrop_fx.errors import UnsupportedModelError

# Attention that computes the softmax that hidrop_fx computes, whichever kernel does it.
_ATTENTION_OF = ("transformers", "torch", "flash_attn", "kernels", "hidrop_fx")


def check_capturable(model: nn.Module, decoder: Any) -> None:
    """Raise where a decoder holds what no graph can.

    Args:
        decoder: the text decoder of `model`.

    Raises:
        UnsupportedModelError: names the module or the weight, its class, and what to do instead.
        CaptureError: the layers are not those that the configuration counts.
    """
    _check_whole(model, decoder)
    check_quantisers(decoder)
    check_weights(model, decoder)
    layer_list(decoder)
    check_hooks(decoder)
    check_adapters(decoder)
    _check_parameters(decoder)
    _check_wrappers(decoder)
    _check_attention(decoder)
    check_sharding(model, decoder)
    check_division(decoder)
    check_values(decoder)
    if not is_sharded(decoder):
        placement_of(decoder)  # raises for a layer in two places


def _check_whole(model: Any, decoder: Any) -> None:
    """Raise for a part of a model, as each process of a pipeline holds one."""
    parts: dict[str, Any] = {"the token embedding": None}
    with suppress(NotImplementedError):  # of transformers, where the attribute is None
        parts["the token embedding"] = decoder.get_input_embeddings()
    if model is not decoder and hasattr(model, "get_output_embeddings"):
        parts["the head"] = model.get_output_embeddings()
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "layers":
            parts |= {f"{path}.{k}": layer for k, layer in enumerate(module)}
    for name, part in parts.items():
        if part is None or isinstance(part, nn.Identity):
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} is a {type(part).__name__}, as in a stage of a pipeline (pipeline "
                "parallelism): a schedule plans all layers of a decoder together, and is compiled for a whole model. Shard its "
                "layers with torch.distributed.fsdp.fully_shard, or spread them over the GPUs of one process with device_map"
            )


def _check_parameters(decoder: nn.Module) -> None:
    for path, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedModelError(
                f"{path} of the text decoder has no shape yet ({type(tensor).__name__}); call the model once "
                "before hidrop.compile"
            )


def _check_wrappers(decoder: nn.Module) -> None:
    for path, module in decoder.named_modules():
        name = path or "the decoder"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name} of the text decoder is TorchScript ({type(module).__name__}), whose code is not traced; "
                "put the module that it was made from in its place"
            )
        if isinstance(module, torch._dynamo.OptimizedModule) or module.__dict__.get(
            "_compiled_call_impl"
        ):
            raise UnsupportedModelError(
                f"{name} of the text decoder ({type(module).__name__}) is compiled by torch.compile itself; leave "
                "that out: hidrop_fx compiles the whole decoder"
            )
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch.distributed"):
                raise UnsupportedModelError(
                    f"{name} of the text decoder is a {kind.__name__} of {kind.__module__}: "
                    f"{_WRAPPERS[kind.__name__]}"
                )


_WRAPPERS = {
    "FullyShardedDataParallel": "each process holds a part of its weights. Use fully_shard of the same package "
    "(FSDP2; fsdp_version: 2 of accelerate), or DistributedDataParallel, around the whole model",
}


def _check_attention(decoder: Any) -> None:
    name = decoder.config._attn_implementation
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    if found is None:
        found = _eager_attention(decoder)
    home = getattr(function_of(found), "__globals__", None) or {}
    module = str(home.get("__name__", type(found).__module__))
    if found is not None and module.partition(".")[0] not in _ATTENTION_OF:
        raise UnsupportedModelError(
            f"the attention {name!r} of the text decoder is {described(found)}, which a compiled model would not "
            "run: it has its own, Options.attention. Call model.set_attn_implementation('sdpa') if that is the "
            "same arithmetic, or leave the model uncompiled"
        )


def _eager_attention(decoder: Any) -> Callable[..., Any] | None:
    """Return `eager_attention_forward` of the file that the decoder's class is defined in."""
    for kind in type(decoder).__mro__:
        forward: Any = vars(kind).get("forward")
        while hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
        found: Callable[..., Any] | None
        found = getattr(forward, "__globals__", {}).get("eager_attention_forward")
        if found is not None:
            return found
    return None
