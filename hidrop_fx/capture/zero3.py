"""A decoder whose parameters DeepSpeed's ZeRO-3 partitions: how it is told, and what a trace is shown of it.

    is_partitioned(decoder)
    with shown_unpartitioned(decoder):   # plain parameters of the whole shape
        captured = capture(decoder)      # DeepSpeed's hooks do not run

Between the calls of its module a partitioned parameter is an empty tensor, which knows its shape as `ds_shape`. Hooks of module calls
gather it in place, and the dictionaries of parameters gather what is read in a call of the model. So the first layer that reads
a parameter has it gathered in all its later calls too. Nothing here imports DeepSpeed.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture.hooks import BACKWARD, FORWARD, is_of_deepspeed
from hidrop_fx.capture.stand_ins import stand_in
from hidrop_fx.errors import HidropError

ATTRIBUTES = frozenset(
    (
        *("ds_id", "ds_recompute_parameters", "ds_grads_remaining", "ds_inflight_param_registry"),
        *("applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn", "_original_parameters"),
        *("_external_params", "ds_external_parameters", "all_parameters", "_z3_leaf"),
    )
)
"""What DeepSpeed keeps in modules that it gathers the parameters of."""


def is_partition(tensor: Tensor) -> bool:
    """Return True for a parameter of ZeRO-3, gathered or not."""
    return hasattr(tensor, "ds_id")


def is_partitioned(module: nn.Module) -> bool:
    """Return True if ZeRO-3 partitions parameters of a module, or of one inside it."""
    return any(map(is_partition, module.parameters()))


def buckets_gradients(model: nn.Module) -> bool:
    """Return True where ZeRO-1 or ZeRO-2 reduces gradients in the order in which they come: it must be that of all processes."""
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    return hasattr(trained, "_hp_mapping") or hasattr(trained, "param_idx_in_group")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape that a parameter has once it is gathered."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def has_hooks(module: nn.Module) -> bool:
    """Return True for a module in whose calls DeepSpeed gathers its parameters."""
    return any(map(is_of_deepspeed, module._forward_pre_hooks.values()))


def partitioned_layouts(decoder: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Return shape and dtype of every parameter, gathered: the same in every call."""
    return tuple((tuple(whole_shape(p)), p.dtype) for p in decoder.parameters())


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Gather parameters of ZeRO-3 for a time: a collective, in front and, to write them back as rank 0 has them, behind."""
    found = [each for each in parameters if is_partition(each)]
    if not found:
        return nullcontext()
    made: AbstractContextManager[Any] = sys.modules["deepspeed"].zero.GatheredParameters(
        found, modifier_rank=0
    )
    return made


def has_master(parameter: Tensor) -> bool:
    """Return True for a parameter of which an optimizer of ZeRO keeps the values in fp32."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def master(parameter: Tensor) -> Tensor:
    """Return the values that an optimizer of ZeRO keeps of a parameter, in fp32: a collective."""
    found: Tensor = sys.modules["deepspeed"].utils.safe_get_full_fp32_param(parameter)
    return found.detach().view(whole_shape(parameter))


def set_master(parameter: Tensor, value: Tensor) -> None:
    """Set the values that ZeRO-2's optimizer keeps of a parameter.

    Raises:
        HidropError: it is ZeRO-3's, whose own function takes no value that the processes do not share evenly.
    """
    if is_partition(parameter):
        raise HidropError(
            "the optimizer of ZeRO-3 has other learned ratios already, and would go on with them: call hidrop_fx.load before "
            "deepspeed.initialize, or resume with DeepSpeed's own checkpoint"
        )
    sys.modules["deepspeed"].utils.safe_set_full_fp32_param(parameter, value)


@contextmanager
def shown_unpartitioned(decoder: nn.Module) -> Iterator[None]:
    """Show plain parameters of the whole shape, in plain dictionaries, and no hooks of DeepSpeed; they take no memory."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    shown: dict[int, Tensor] = {}
    try:
        for module in decoder.modules():
            values = module.__dict__
            for table in (*FORWARD, *BACKWARD):
                hooks = values[table]
                if any(map(is_of_deepspeed, hooks.values())):
                    undo.append((values, table, hooks))
                    values[table] = OrderedDict(
                        (k, h) for k, h in hooks.items() if not is_of_deepspeed(h)
                    )
            kept = values["_parameters"]
            undo.append((values, "_parameters", kept))
            values["_parameters"] = {
                name: None
                if p is None
                else shown.setdefault(id(p), stand_in(p, shape=whole_shape(p)))
                for name, p in kept.items()
            }
        yield
    finally:
        for values, name, value in reversed(undo):
            values[name] = value
