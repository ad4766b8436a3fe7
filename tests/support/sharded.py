"""Tiny models that two gloo processes shard with FSDP2, and what one process makes of both processes' rows.

torch.multiprocessing.spawn(run_cases, (directory, port, "tests.distributed.cases", names), nprocs=2)
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import hidrop_fx as hidrop
from tests.support.models import IMAGE, batch, tiny_llava

ROWS = [
    [[5, IMAGE, 6, 7, 8], [9, 10, IMAGE, 11, 12, 13, 14]],
    [[13, IMAGE, 14, 15], [IMAGE, 16, 17, 18, 19]],
]
"""Of each rank."""
WORDS = [ROWS[0], [[13, 5, 14, 15], [8, 16, 17, 18, 19]]]
"""The same, but the second rank has no image."""
LIMIT = 1800
"""Seconds after which a process that runs cases is ended: for a busy machine. A process that waits for another in vain ends long before."""


def model_of(num_layers: int = 4, **options: Any) -> Any:
    return tiny_llava(num_layers=num_layers, **options)


def inputs_of(
    model: Any, rows: Any, padding: str = "left", *, labels: bool = True
) -> dict[str, Any]:
    """A batch; the last two tokens of each row are the answer."""
    inputs: dict[str, Any] = batch(model, rows, padding=padding)  # type: ignore[arg-type]
    if labels:
        wanted = inputs["input_ids"].clone()
        for row, mask in zip(wanted, inputs["attention_mask"], strict=True):
            real = mask.nonzero().flatten()
            row[[i for i in range(len(row)) if i not in real[-2:].tolist()]] = -100
        inputs["labels"] = wanted
    return inputs


def mesh() -> DeviceMesh:
    return torch.distributed.init_device_mesh("cpu", (2,))


def shard(
    model: Any,
    *,
    root: Any = None,
    norm: bool = True,
    tower: bool = True,
    group: int = 1,
    ends: bool = False,
    wrapped: bool | int | None = None,
    **options: Any,
) -> Any:
    """Shard each decoder layer, the final norm with the head, those of the tower, and the rest as the root.

    Args:
        group: so many first decoder layers in one unit.
        ends: the embedding in a unit with the first layer, the last layer in one with the norm and the head, those between in
            one.
        wrapped: `group_shallow` of `hidrop.fully_shard`, which does it then.
    """
    if wrapped is not None:
        return hidrop.fully_shard(model, mesh(), group_shallow=wrapped, **options)
    over = {"mesh": mesh(), **options}
    decoder = model.get_decoder()
    if ends:
        first, *others, last = decoder.layers
        fully_shard([model.get_input_embeddings(), first], **over)
        fully_shard(others, **over)
        fully_shard([last, decoder.norm, model.get_output_embeddings()], **over)
        return fully_shard(model, **over)
    for layer in ([*decoder.layers[:group]], *decoder.layers[group:]):
        fully_shard(layer, **over)
    if norm:
        fully_shard([decoder.norm, model.get_output_embeddings()], **over)
    # Not the tower: transformers, which records its hidden states by the name of the class, finds none in one of FSDP2's.
    for layer in model.model.vision_tower.encoder.layers if tower else ():
        fully_shard(layer, **over)
    fully_shard(model if root is None else root, **over)
    return model


@contextmanager
def one_process(*names: str) -> Iterator[DeviceMesh]:
    """A device mesh of one process, with an axis of that name each."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield distributed.init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
    finally:
        distributed.destroy_process_group()


def full(tensor: Tensor) -> Tensor:
    gather: Any = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().clone()


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: full(p.grad) for n, p in _named(model).items() if p.grad is not None}


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: full(p) for n, p in _named(model).items()}


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without wrappers around layers."""
    return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}


def train(
    model: Any, batches: list[dict[str, Any]], steps: int = 3, optimizer: Any = None
) -> dict[str, Any]:
    """Take AdamW steps on the mean of the losses of some batches; return losses, first gradients, last parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if optimizer is None else optimizer
    found: dict[str, Any] = {"losses": []}
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for inputs in batches:
            loss = model(**inputs).loss / len(batches)
            if loss.requires_grad:  # not of words alone where the projector alone is trained
                loss.backward()
            total += float(loss.detach())
        found["losses"].append(total)
        if step == 0:
            found["gradients"] = full_gradients(model)
        optimizer.step()
    found["parameters"] = full_parameters(model)
    return found


def mean_of_ranks(values: list[float]) -> list[float]:
    """Average over ranks."""
    both = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(both)
    return (both / distributed.get_world_size()).tolist()


def apart(found: dict[str, Tensor], expected: dict[str, Tensor] | None) -> float:
    """Return the largest L2 distance of two tensors of one name, relative to the norm of the expected one.

    Zero for the process that has nothing to compare with.
    """
    if expected is None:
        return 0.0
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:4]
    floor = 1e-7 * max(float(e.norm()) for e in expected.values())
    return max(
        float((found[name] - e).norm()) / max(float(e.norm()), floor)
        for name, e in expected.items()
    )


Case = Callable[[int], Any]


def run_cases(
    rank: int,
    directory: str,
    port: int,
    module: str,
    names: list[str],
    limit: int = LIMIT,
    backend: str = "gloo",
    world: int = 2,
) -> None:
    """Run functions of a module one after another in one of two processes, and save what each returned, or its error.

    Args:
        module: of the functions; a name such as "package.module:case" has its own.
    """
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(limit, exit=True)
    if backend != "gloo":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    for each in names:
        place, _, name = each.rpartition(":")
        case: Case = getattr(importlib.import_module(place or module), name)
        try:
            found: Any = case(rank)
        except BaseException as error:  # pytest.fail raises no Exception
            found = error.__class__.__name__ + ": " + str(error) + "\n" + traceback.format_exc()
            torch.save({"error": found}, Path(directory) / f"{name}.{rank}.pt")
            break  # the other process may be waiting in this case
        torch.save({"value": found}, Path(directory) / f"{name}.{rank}.pt")
    else:
        distributed.barrier()  # the store lives in the first process
    sys.stderr.flush()
    os._exit(0)  # Gloo's threads held a process of a busy machine up at its ordinary end.
