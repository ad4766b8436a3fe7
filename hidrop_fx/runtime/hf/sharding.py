"""Shard a model with FSDP2, a unit a layer, the first layers in one unit where a plan says that it pays.

    hidrop.compile(model, "hidrop-64")
    hidrop.fully_shard(model, mesh, group_shallow=True)

is, but for the group,

    for layer in (*decoder.layers, *vision_tower_layers): fully_shard(layer, mesh=mesh)
    fully_shard([decoder.norm, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
"""

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from hidrop_fx.capture.layers import final_norm, layer_list, text_decoder
from hidrop_fx.capture.sharded import is_sharded
from hidrop_fx.errors import HidropError
from hidrop_fx.planning import Costs, plan
from hidrop_fx.planning.geometry import MODULES
from hidrop_fx.runtime.hf.binding import schedules_of, unwrapped

logger = logging.getLogger("hidrop_fx")

Model = TypeVar("Model", bound=nn.Module)
_OF_WEIGHTS = ("mp_policy", "shard_placement_fn")
"""Options that learned ratios, a few numbers in fp32, do without."""


def fully_shard(
    model: Model,
    mesh: Any = None,
    *,
    group_shallow: bool | int = False,
    costs: Costs | None = None,
    **options: Any,
) -> Model:
    """Call PyTorch's `fully_shard` on each decoder layer, the tower's layers, norm and head, and the model; return the model.

    Before or after `compile`, in every process. Learned ratios become a unit of their own, in fp32, where the model is compiled
    under a schedule that learns. Sharding by hand does as well.

    Args:
        model: a transformers VLM, or PEFT's model around one.
        mesh: `torch.distributed.device_mesh.DeviceMesh`; of two dimensions for hybrid sharding. None for all processes.
        group_shallow: so many first decoder layers in one unit, gathered by one collective. True for as many as make the step
            of `costs` fastest, often none: `ScaleOut.shallow_group`.
        costs: what `hidrop_fx.plan(..., world_size=N)` made. None for the schedule that the model is compiled with, a row a
            process, on the links that `hidrop_fx.Cluster` assumes.
        options: those of `torch.distributed.fsdp.fully_shard` (`mp_policy`, `reshard_after_forward`, ...), for every unit.

    Raises:
        HidropError: there is no process group, the model is sharded already, or `group_shallow` is no number of its layers
            or cannot be found out. Nothing is sharded then.
    """
    from torch.distributed.fsdp import fully_shard as shard

    target: Any = unwrapped(model)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise HidropError(
            "there is no process group to shard over: start with torchrun, and call torch.distributed.init_process_group() first"
        )
    if is_sharded(target):
        raise HidropError(
            f"this {type(target).__name__} is sharded already, or a part of it is; call hidrop_fx.fully_shard once, on the "
            "whole model"
        )
    decoder = text_decoder(target)
    layers = list(layer_list(decoder)[1])
    first = _first(target, len(layers), mesh, group_shallow, costs)
    if first > 1:
        logger.info("the decoder's layers 0-%d are one unit of fully_shard", first - 1)
    units = [layers[0] if first == 1 else layers[:first], *layers[first:]]
    units += _tower_layers(target, decoder)
    head = target.get_output_embeddings()
    last = [final_norm(decoder)]
    if head is not None and not _is_tied(head, target.get_input_embeddings()):
        last.append(head)
    units.append(last if len(last) > 1 else last[0])
    for unit in units:
        shard(unit, mesh=mesh, **options)
    own = {name: value for name, value in options.items() if name not in _OF_WEIGHTS}
    for ratios in _ratios(target):
        shard(ratios, mesh=mesh, **own)
    shard(model, mesh=mesh, **options)
    return model


def _first(
    model: Any, count: int, mesh: Any, group_shallow: bool | int, costs: Costs | None
) -> int:
    """Return how many first layers make one unit.

    Raises:
        HidropError: it is no number of layers, or there is no plan to tell it.
    """
    if not isinstance(group_shallow, int) or not 0 <= group_shallow <= count:
        raise HidropError(
            f"group_shallow={group_shallow!r}: pass True, False, or how many of the {count} layers are to be one unit"
        )
    if costs is not None and costs.scale_out is None:
        raise HidropError("costs= were planned for one GPU: hidrop_fx.plan(..., world_size=N)")
    if group_shallow is not True:
        return max(1, int(group_shallow))
    if costs is None:
        schedules = schedules_of(model)
        if schedules is None:
            raise HidropError(
                "group_shallow=True asks a plan: compile the model first, pass costs=hidrop_fx.plan(..., world_size=N), or "
                "pass a number of layers"
            )
        size = torch.distributed.get_world_size() if mesh is None else mesh.size()
        costs = plan(schedules.default.schedule, model, world_size=size)
    assert costs.scale_out is not None
    if costs.geometry.num_layers != count:
        raise HidropError(
            f"costs= are those of {costs.geometry.num_layers} layers, the model has {count}; plan its own"
        )
    return costs.scale_out.shallow_group


def _tower_layers(model: Any, decoder: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of lists outside the text decoder: layers of the vision tower, mostly."""
    inside = {id(each) for each in decoder.modules()}
    done = {id(each) for each in getattr(model, MODULES, nn.Module()).modules()}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and not {id(module)} & (inside | done):
            for each in module:
                done.update(id(part) for part in each.modules())
                if any(True for _ in each.parameters()):
                    yield each


def _is_tied(head: nn.Module, embedding: nn.Module) -> bool:
    """Return True if they hold a parameter in common, which no two units can."""
    own = {id(each) for each in embedding.parameters()}
    return any(id(each) in own for each in head.parameters())


def _ratios(model: Any) -> Iterator[nn.Module]:
    """Yield what schedules of a compiled model learn."""
    found = schedules_of(model)
    for runtime in () if found is None else found.named.values():
        ratios = getattr(model, runtime.ratios_at, None)
        if isinstance(ratios, nn.Module):
            yield ratios
