"""Check at the first call that all processes run a model under one schedule.

    check_agreement(mesh, str(schedule))      # raises on every rank

Hooks that gather parameters wait for the other processes, in the order of the layers. One that runs other layers, or
none, would make all wait until the time limit of their collectives. So each puts down what it runs in the store that the
process group was made with, and reads what the others put there: no collective, which might meet another's.
"""

import datetime
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from hidrop_fx.errors import HidropError

WAIT_SECONDS = 45.0
"""Time in which the other processes must come to their first call, once the model was called in all of them."""

_counters: defaultdict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)
"""By the ranks that compare: how often they did. Ranks of one mesh may be in another, which compares on its own."""


def check_agreement(mesh: Any, text: str, *, wait_seconds: float | None = None) -> None:
    """Compare a text with that of the other processes of a device mesh.

    Args:
        mesh: `torch.distributed.device_mesh.DeviceMesh` over which parameters are sharded; None for all processes.
        text: equal where processes run the same layers.
        wait_seconds: None for `WAIT_SECONDS`.

    Raises:
        HidropError: one runs another schedule, or none came within the time.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    ranks: list[int] = [*range(dist.get_world_size())]
    if mesh is not None:
        ranks = mesh.mesh.flatten().tolist()
    own = dist.get_rank()
    if len(ranks) < 2:
        return
    if mesh is not None and mesh.device_type == "cuda":
        torch.cuda.synchronize()  # the parameters of the model itself were gathered: all have called it
    store, number = _get_default_store(), next(_counters[tuple(ranks)])
    place = f"hidrop_fx/schedule/{','.join(map(str, ranks))}/{number}"
    keys = {rank: f"{place}/{rank}" for rank in ranks}
    store.set(keys[own], text)
    wait = datetime.timedelta(seconds=WAIT_SECONDS if wait_seconds is None else wait_seconds)
    others = [keys[rank] for rank in ranks if rank != own]
    try:
        store.wait(others, wait)
    except Exception as error:  # of a type that depends on the store
        missing = [rank for rank in ranks if rank != own and not _is_there(store, keys[rank])]
        raise HidropError(
            f"rank {own} runs a model compiled under {_shown(text)}, and rank {', '.join(map(str, missing)) or '?'} came to no call "
            f"of a compiled one within {wait.total_seconds():g} s. Where parameters are sharded, every process must call "
            "hidrop.compile(model, schedule) with the same schedule, before the first call"
        ) from error
    found = {rank: store.get(keys[rank]).decode() for rank in ranks}
    if len(set(found.values())) > 1:
        shown = "; ".join(f"rank {rank}: {_shown(each)}" for rank, each in found.items())
        raise HidropError(
            f"the processes run different schedules ({shown}), and would wait for each other's layers for ever. Call "
            "hidrop.compile(model, schedule) with the same schedule and the same number of layers in each"
        )


def _is_there(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except Exception:  # the process that serves the store has gone
        return False


def _shown(text: str) -> str:
    """Name a schedule by its text, cut if it is long, with a hash of the whole."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text if len(text) <= 120 else text[:117] + '...'} [{digest}]"
