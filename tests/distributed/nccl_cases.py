"""What `test_nccl` runs in each process, one a GPU; with one process FSDP2 gathers from itself, streams and all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy

import hidrop_fx as hidrop
from tests.distributed.cases import LEARNING
from tests.support import counter
from tests.support.sharded import ROWS, apart, full_parameters, inputs_of, model_of, shard, train


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in inputs.items()}


def rows_of(rank: int) -> Any:
    return ROWS[rank % len(ROWS)]


def made(backend: str) -> Any:
    return hidrop.compile(model_of().cuda().train(), LEARNING, backend=backend)


def compared(rank: int, backend: str, **options: Any) -> Any:
    """Losses aside: gradients and parameters behind three steps, and greedy tokens, against one process on one GPU."""
    ranks = range(distributed.get_world_size())
    alone = made(backend)
    expected = train(alone, [on_gpu(inputs_of(alone, rows_of(k), "right")) for k in ranks])
    mesh = distributed.init_device_mesh("cuda", (len(ranks),))
    model = shard(made(backend), mesh=mesh, **options)
    own = on_gpu(inputs_of(model, rows_of(rank), "right"))
    with counter.expect(fallbacks=0):
        found = train(model, [own])
    asked = on_gpu(inputs_of(model, rows_of(rank), labels=False))
    tokens = model.eval().generate(**asked, max_new_tokens=4, do_sample=False)
    wanted = alone.eval().generate(**asked, max_new_tokens=4, do_sample=False)
    return {
        "gradients": apart(found["gradients"], expected["gradients"]),
        "parameters": apart(found["parameters"], expected["parameters"]),
        "tokens": bool(torch.equal(tokens, wanted)),
    }


def eager(rank: int) -> Any:
    return compared(rank, "eager")


def inductor(rank: int) -> Any:
    return compared(rank, "inductor")


def offloaded(rank: int) -> Any:
    """Parameters lie in pinned memory of the host between calls."""
    return compared(rank, "eager", offload_policy=CPUOffloadPolicy())


def trainer(rank: int) -> Any:
    """`Trainer(fsdp=True)` as it is, nothing patched."""
    import transformers

    world = distributed.get_world_size()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    layers = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
    alone = made("eager")
    ranks = range(world)
    expected = train(alone, [on_gpu(inputs_of(alone, rows_of(k), "right")) for k in ranks])
    rows = [row for k in ranks for row in rows_of(k)]
    launched = patch.dict("os.environ", {k: str(v) for k, v in place.items()})
    with launched, tempfile.TemporaryDirectory() as folder:
        given = transformers.TrainingArguments(
            output_dir=str(Path(folder)),
            report_to=[],
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            save_strategy="no",
            max_steps=3,
            fsdp=True,
            fsdp_config={"transformer_layer_cls_to_wrap": layers},
        )
        model = made("eager")
        ran = transformers.Trainer(
            model=model,
            args=given,
            train_dataset=[{"row": k} for k in range(len(rows))] * 3,  # type: ignore[arg-type]
            data_collator=lambda some: inputs_of(model, [rows[e["row"]] for e in some], "right"),
            callbacks=[hidrop.TrainerCallback()],
        )
        ran.train()
    return {"parameters": apart(full_parameters(ran.model), expected["parameters"])}
