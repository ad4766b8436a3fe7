"""One training step in two processes, for `test_training_ecosystem`."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import hidrop_fx as hidrop
from tests.support.gradients import gradients
from tests.support.models import IMAGE, batch, tiny_llava

SCHEDULE = "inject=1,prune=1:6,selection=dtopk"
ROWS = [[5, IMAGE, 6, 7, 8], [9, 10, IMAGE, 11, 12], [13, IMAGE, 14, 15], [IMAGE, 16, 17, 18]]


def model_and_inputs() -> tuple[Any, dict[str, Any]]:
    """Four rows with two answer tokens each, and ratios away from their start."""
    model: Any = hidrop.compile(tiny_llava(num_layers=2), SCHEDULE, backend="eager")
    model.hidrop_ratios.values.data += 0.05
    inputs: dict[str, Any] = batch(model, ROWS, padding="left")
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return model.train(), inputs | {"labels": labels}


def half(rank: int, directory: str, port: int) -> None:
    """The step of one of two processes, on its half of the rows."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(200, exit=True)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model, inputs = model_and_inputs()
    rows = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    assert hidrop.is_compiled(parallel)
    parallel(**rows).loss.backward()
    if rank == 0:
        torch.save(gradients(model), Path(directory) / "gradients.pt")
    distributed.barrier()  # the store lives in the first process
    sys.stderr.flush()
    os._exit(0)  # Gloo's threads held a process of a busy machine up at its ordinary end.
