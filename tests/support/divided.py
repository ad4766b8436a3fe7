"""Tiny models that two processes divide as transformers' tensor parallelism does, from weights that each of them has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import distributed
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

GATHERED = {
    **{
        f"model.language_model.layers.*.self_attn.{name}": "colwise_gather_output"
        for name in ("q_proj", "k_proj", "v_proj")
    },
    "model.language_model.layers.*.self_attn.o_proj": "rowwise_split_input",
}
"""Rules, as those of Phi 3, under which each process has all heads."""


@contextmanager
def one_of_two(rank: int = 0) -> Iterator[None]:
    """Be one of two processes, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def divide(model: Any, plan: Mapping[str, str] | Literal["auto"] = "auto") -> Any:
    """Divide a model over all processes, as `from_pretrained` does, and return it.

    Args:
        plan: rules in the place of some of the model's own.
    """
    size = distributed.get_world_size()
    names = ("pp", "dp_replicate", "fsdp", "tp")
    device = next(model.parameters()).device.type
    mesh = distributed.init_device_mesh(device, (1, 1, 1, size), mesh_dim_names=names)
    sizes: dict[str, int] = dict.fromkeys(
        ("pp_size", "dp_replicate_size", "fsdp_size", "ep_size"), 1
    )
    config = DistributedConfig(tp_size=size, tp_plan=plan, **sizes)  # type: ignore[arg-type]
    model.init_parallel_plans()
    divided = type(model).maybe_distribute_model(model, config, TransformersDeviceMesh(mesh, mesh))
    divided.config.distributed_config = config
    return divided


def same_everywhere(value: torch.Tensor) -> bool:
    """Return True if every process has the same tensor."""
    found = [torch.empty_like(value) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, value.contiguous())
    return all(torch.equal(each, value) for each in found)
