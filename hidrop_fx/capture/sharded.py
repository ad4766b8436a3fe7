"""A decoder whose parameters FSDP2 or ZeRO-3 shards: how it is told, what is refused, and what a trace is shown of it.

    is_sharded(decoder)
    with shown_whole(decoder):           # plain parameters of the unsharded shape, in the dtype computed in
        captured = capture(decoder)      # FSDP2's hooks do not run

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers parameters in hooks of module calls, as DTensors outside and as
plain tensors inside. A trace under its hooks would gather while tracing, and leave fake tensors in them. What is DeepSpeed's
own is in `zero3.py`.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture.hooks import FORWARD, described, function_of, is_bookkeeping
from hidrop_fx.capture.layer_wrappers import wrapped_chain
from hidrop_fx.capture.layers import final_norm, layer_list
from hidrop_fx.capture.quantised import is_distributed, is_quantised
from hidrop_fx.capture.stand_ins import stand_in
from hidrop_fx.capture.zero3 import (
    has_hooks,
    is_partition,
    is_partitioned,
    partitioned_layouts,
    shown_unpartitioned,
    whole_shape,
)
from hidrop_fx.errors import HidropError, UnsupportedModelError

_MANAGED = "_is_fsdp_managed_module"
"""Attribute that FSDP2 gives to each module that holds parameters which it shards."""
_HOOKS_FROM = "torch.distributed.fsdp"


def is_sharded(module: nn.Module) -> bool:
    """Return True if FSDP2 or ZeRO-3 shards parameters of a module, or of one inside it."""
    return is_partitioned(module) or _is_managed(module)


def _is_managed(module: nn.Module) -> bool:
    here = torch.distributed
    if (
        "torch.distributed.fsdp" not in sys.modules
        or not here.is_available()
        or not here.is_initialized()
    ):
        return False
    return any(_MANAGED in each.__dict__ for each in module.modules())


def is_unit(module: nn.Module) -> bool:
    """Return True for a module whose own hooks gather its parameters: `fully_shard` was called on it, or ZeRO-3 knows it."""
    return _is_fsdp_unit(module) or has_hooks(module)


def _is_fsdp_unit(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_whole(tensor: Tensor) -> bool:
    """Return True for a tensor that this process holds all of."""
    if is_partition(tensor):
        return tensor.shape == whole_shape(tensor)
    return type(tensor) in (nn.Parameter, Tensor) or not is_distributed(tensor)


def check_sharding(model: nn.Module, decoder: Any) -> None:
    """Raise where `fully_shard` was called on modules that a compiled model does not call.

    It calls the model, the parts in front of the decoder, the decoder's embedding, layers and final norm, and the head.

    Raises:
        UnsupportedModelError: names the module, and what to shard instead.
    """
    if is_partitioned(decoder):
        check_partitioning(model, decoder)
        return
    if not is_sharded(model):
        return
    units = [*layer_list(decoder)[1], final_norm(decoder)]
    called = {id(each) for unit in units for each in wrapped_chain(unit)}
    called |= {id(each) for each in decoder.get_input_embeddings().modules()}
    inside = {id(each) for each in decoder.modules()}
    for path, module in model.named_modules():
        around = module is not model and any(each is decoder for each in module.modules())
        if not (around or id(module) in inside):
            if _records_features(model, module):
                raise UnsupportedModelError(
                    f"fully_shard was called on {path} ({type(module).__name__}), whose hidden states are the features of an "
                    "image: transformers, which records them by the name of the class, finds none in a class of FSDP2's. Call it on "
                    "the layers of the tower"
                )
            continue
        if _is_fsdp_unit(module) and id(module) not in called and module is not model:
            raise UnsupportedModelError(
                f"fully_shard was called on {path} ({type(module).__name__}), which a compiled model does not call, so "
                "that nothing would gather its parameters. Call it on each decoder layer, on the layers of the vision tower, and on the "
                "whole model (on the final norm, the embedding and the head if they are to be units of their own)"
            )
        if id(module) in called and id(module) in inside:
            _check_hooks(path, module, decoder)
    for path, parameter in decoder.named_parameters():
        if is_quantised(getattr(parameter, "_local_tensor", parameter)):
            raise UnsupportedModelError(
                f"{path} of the text decoder is a quantised weight of a model that fully_shard shards; use one of the two"
            )


def _records_features(model: Any, module: Any) -> bool:
    """Return True for a sharded tower of which transformers' own forward finds no features."""
    chosen = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    inner = module is not model and _is_fsdp_unit(module)
    return chosen is not None and inner and bool(getattr(module, "_can_record_outputs", None))


def _check_hooks(path: str, module: nn.Module, decoder: Any) -> None:
    """Raise for hooks of layers, which would run both while the decoder is traced and in each call."""
    if any(module is each for each in decoder.get_input_embeddings().modules()):
        return
    for table in FORWARD:
        for hook in module.__dict__[table].values():
            if not is_bookkeeping(hook):
                name = f"{path} ({type(module).__name__})"
                raise UnsupportedModelError(
                    f"{name} has the hook {described(hook)}, and is called with other arguments "
                    "where fully_shard or ZeRO-3 shards its parameters. Remove the hook by its handle, or put it on a module inside"
                )


def not_gathered(path: str, tensor: Tensor | None = None) -> HidropError:
    """Return the error for a parameter that no module's call has gathered."""
    if tensor is not None and is_partition(tensor):
        return HidropError(
            f"{path} of the text decoder is partitioned by ZeRO-3 where it is read: nothing has gathered it. Call "
            "deepspeed.initialize(model=model, ...) first, and then the engine or the model, not model.forward(...)"
        )
    return HidropError(
        f"{path} of the text decoder is sharded where it is read: nothing has gathered it. Call the module that "
        "fully_shard was called on, model(...) and not model.forward(...), and shard each decoder layer and the whole model"
    )


def check_partitioning(model: nn.Module, decoder: Any) -> None:
    """Raise for hooks of layers that ZeRO-3 gathers: those of the user would run in each call."""
    units = [*layer_list(decoder)[1], final_norm(decoder)]
    called = {id(each) for unit in units for each in wrapped_chain(unit)}
    for path, module in model.named_modules():
        if id(module) in called:
            _check_hooks(path, module, decoder)


def mesh_of(decoder: nn.Module) -> Any:
    """Return the device mesh that parameters are sharded over, from any of them that is; None if all are gathered."""
    found = (getattr(parameter, "device_mesh", None) for parameter in decoder.parameters())
    return next((mesh for mesh in found if mesh is not None), None)


def shown_whole(decoder: nn.Module) -> AbstractContextManager[None]:
    """Show plain parameters of the unsharded shape, and no hooks of FSDP2 or DeepSpeed; they take no memory."""
    return shown_unpartitioned(decoder) if is_partitioned(decoder) else _shown_unsharded(decoder)


@contextmanager
def _shown_unsharded(decoder: nn.Module) -> Iterator[None]:
    """Show what FSDP2 shards whole.

    Their dtype is the one that FSDP2 computes in, `MixedPrecisionPolicy.param_dtype`: casts that are none in the dtype
    of the shards would be missing from the graph.

    Raises:
        HidropError: a parameter is sharded by a module that was not called.
    """
    gathered = _gathered(decoder)
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in decoder.modules():
            values = module.__dict__
            for table in FORWARD:
                hooks = values[table]
                if any(map(_is_engines, hooks.values())):
                    undo.append((values, table, hooks))
                    values[table] = OrderedDict(
                        (k, h) for k, h in hooks.items() if not _is_engines(h)
                    )
            parameters = values["_parameters"]
            for name, parameter in list(parameters.items()):
                if parameter is not None:
                    undo.append((parameters, name, parameter))
                    parameters[name] = _stand_in(name, parameter, gathered)
        yield
    finally:
        for values, name, value in reversed(undo):
            values[name] = value


@contextmanager
def outputs_as_computed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep FSDP2 from casting what some of its units return to `MixedPrecisionPolicy.output_dtype`."""
    units: list[Any] = [module for module in modules if _is_fsdp_unit(module)]
    states = [unit._get_fsdp_state() for unit in units]
    undo = [(s, s._mp_policy) for s in states if s._mp_policy.output_dtype is not None]
    for state, policy in undo:
        state._mp_policy = replace(policy, output_dtype=None)
    try:
        yield
    finally:
        for state, policy in undo:
            state._mp_policy = policy


def sharded_layouts(decoder: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Return shape and dtype of every parameter as a forward sees it, where an engine knows it: the same in every call."""
    if is_partitioned(decoder):
        return partitioned_layouts(decoder)
    found = _gathered(decoder).values()
    return tuple(dict.fromkeys((shape, dtype) for shape, dtype, _ in found))


def _gathered(decoder: nn.Module) -> dict[int, tuple[torch.Size, torch.dtype, torch.device]]:
    """Return shape, dtype and device of parameters once they are gathered, by the id of both objects that stand for one."""
    found = {}
    units: list[Any] = [module for module in decoder.modules() if _is_fsdp_unit(module)]
    for unit in units:
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # a release in which a unit has one
            groups = filter(None, [state._fsdp_param_group])
        for group in groups:
            for one in group.fsdp_params:
                if one.is_dtensor:
                    name = one._module_info.param_name
                    raise UnsupportedModelError(
                        f"{name} of {type(one._module_info.module).__name__} is sharded by tensor "
                        "parallelism as well as by fully_shard; hidrop_fx follows fully_shard alone"
                    )
                dtype, policy = one.sharded_param.dtype, group.mp_policy.param_dtype
                if policy is not None and dtype.is_floating_point:
                    dtype = policy
                known = (one._orig_size, dtype, one.device)
                found[id(one.sharded_param)] = known
                if hasattr(one, "_unsharded_param"):
                    found[id(one._unsharded_param)] = known
    return found


def _stand_in(
    name: str, parameter: Tensor, gathered: dict[int, tuple[torch.Size, torch.dtype, torch.device]]
) -> Tensor:
    if id(parameter) in gathered:
        shape, dtype, device = gathered[id(parameter)]
        return stand_in(parameter, shape=shape, dtype=dtype, device=device)
    if not is_whole(parameter):
        raise not_gathered(f"{name} {list(parameter.shape)}")
    return stand_in(parameter)


def _is_engines(hook: Any) -> bool:
    home = getattr(function_of(hook), "__globals__", None) or {}
    return str(home.get("__name__", "")).startswith(_HOOKS_FROM)
