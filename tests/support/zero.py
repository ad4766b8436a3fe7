"""DeepSpeed's engine on two gloo processes: ZeRO-2 and ZeRO-3, and the whole gradients and parameters of a model under them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from hidrop_fx.runtime.hf.binding import unwrapped
from tests.support.sharded import apart, inputs_of, mean_of_ranks
from tests.support.sharded import train as train_alone


def config_of(stage: int, **changes: Any) -> dict[str, Any]:
    """A configuration for tiny models: none of their parameters is kept gathered for being small."""
    zero = {
        "stage": stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        **changes.pop("zero_optimization", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **changes,
    }


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Without weight decay: DeepSpeed steps parameters that have no gradient by one of zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)


def expected_of(model: Any, rows: Any, padding: str = "right") -> dict[str, Any]:
    """What one process makes of the rows of both, in three steps."""
    batches = [inputs_of(unwrapped(model), each, padding) for each in rows]
    return train_alone(model, batches, optimizer=adamw(model))


def started(model: Any, stage: int, *, optimizer: Any = None, **changes: Any) -> Any:
    """DeepSpeed's engine around a model, with torch's AdamW."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(torch.distributed.get_rank()))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    chosen = adamw(model) if optimizer is None else optimizer
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=chosen, config=config_of(stage, **changes)
    )
    return engine


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Mean over the processes, by name: a collective."""
    from deepspeed.utils import safe_get_full_grad

    found = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
    return {n: g.detach().clone() for n, g in found.items() if g is not None}


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """A collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def train(engine: Any, batches: list[dict[str, Any]], steps: int = 3) -> dict[str, Any]:
    """Take steps on the mean of the losses of some batches; return losses, first gradients, last parameters."""
    found: dict[str, Any] = {"losses": []}
    for step in range(steps):
        total = 0.0
        for place, inputs in enumerate(batches, 1):
            loss = engine(**inputs).loss
            engine.backward(loss)
            total += float(loss.detach()) / len(batches)
            if step == 0 and place == len(batches):
                found["gradients"] = full_gradients(engine.module)
            engine.step()
        found["losses"].append(total)
    found["parameters"] = full_parameters(engine.module)
    return found


def distances(found: dict[str, Any], expected: dict[str, Any] | None) -> dict[str, Any]:
    """How far losses, first gradients and last parameters are from one process's; zero where there is none to compare with."""
    losses = mean_of_ranks(found["losses"])
    wanted = losses if expected is None else expected["losses"]
    there = found if expected is None else expected
    result = {
        "parameters": apart(found["parameters"], there["parameters"]),
        "losses": max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)),
    }
    if "gradients" in found:
        gradients = dict(found["gradients"])
        for name in gradients.keys() - there["gradients"].keys():
            assert not gradients.pop(name).any(), name
        result["gradients"] = apart(gradients, there["gradients"])
        result["count"] = len(found["gradients"])
    return result


def backend_of_cpus() -> Any:
    """Let accelerate find a backend on a CPU, too, where it starts DeepSpeed: it knows those of accelerators alone."""
    from accelerate import state
    from accelerate.utils import DistributedType

    backend = "gloo", DistributedType.MULTI_CPU
    return patch.object(state.PartialState, "_prepare_backend", lambda *_: backend)


@contextmanager
def launched(rank: int, world: int = 2) -> Iterator[None]:
    """Run a process of a group that is there as one that a launcher started for DeepSpeed; leave nothing of accelerate's."""
    from accelerate import state

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    found = {k: str(v) for k, v in place.items()} | {"DS_ACCELERATOR": "cpu"}
    with patch.dict(os.environ, found), backend_of_cpus():
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()
