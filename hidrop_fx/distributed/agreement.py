"""Check that all processes run a model under one schedule: at the first call, and where the schedule changes.

    check_agreement(mesh, str(schedule))      # raises on every rank
    check_presence(mesh, "save")              # raises where the others do not come

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


class _AbsentError(Exception):
    """Some processes did not come within a time."""

    def __init__(self, ranks: list[int], seconds: float) -> None:
        self.ranks = ", ".join(map(str, ranks)) or "?"
        self.seconds = seconds


def check_agreement(
    mesh: Any, text: str, *, changes: bool = False, wait_seconds: float | None = None
) -> None:
    """Compare a text with that of the other processes of a device mesh.

    Args:
        mesh: `torch.distributed.device_mesh.DeviceMesh` over which parameters are sharded; None for all processes.
        text: equal where processes run the same layers.
        changes: they agreed on another before.
        wait_seconds: None for `WAIT_SECONDS`.

    Raises:
        HidropError: one runs another schedule, or none came within the time.
    """
    own = torch.distributed.get_rank()
    try:
        found = _put_down(mesh, text, wait_seconds)
    except _AbsentError as absent:
        if changes:
            raise HidropError(
                f"rank {own} changes to the schedule {_shown(text)}, and rank {absent.ranks} came to no change within "
                f"{absent.seconds:g} s. Where parameters are sharded, every process must change the schedule (hidrop.use, "
                "hidrop_schedule=...) before the same call"
            ) from absent.__cause__
        raise HidropError(
            f"rank {own} runs a model compiled under {_shown(text)}, and rank {absent.ranks} came to no call "
            f"of a compiled one within {absent.seconds:g} s. Where parameters are sharded, every process must call "
            "hidrop.compile(model, schedule) with the same schedule, before the first call"
        ) from absent.__cause__
    if len(set(found.values())) > 1:
        shown = "; ".join(f"rank {rank}: {_shown(each)}" for rank, each in found.items())
        raise HidropError(
            f"the processes run different schedules ({shown}), and would wait for each other's layers for ever. Call "
            "hidrop.compile(model, schedule) with the same schedule and the same number of layers in each"
        )


def check_presence(mesh: Any, what: str, remedy: str, *, wait_seconds: float | None = None) -> None:
    """Wait until all processes of a device mesh have come to the same place, in front of a collective.

    Args:
        what: this process does, for the message: "saves ...".
        remedy: for the message.

    Raises:
        HidropError: one did not come within the time, or to another place.
    """
    own = torch.distributed.get_rank()
    try:
        found = _put_down(mesh, what, wait_seconds)
    except _AbsentError as absent:
        raise HidropError(
            f"rank {own} {what}, and rank {absent.ranks} did not within {absent.seconds:g} s. {remedy}"
        ) from absent.__cause__
    for rank, each in found.items():
        if each != what:
            raise HidropError(f"rank {own} {what}, and rank {rank} runs {_shown(each)}. {remedy}")


def _put_down(mesh: Any, text: str, wait_seconds: float | None) -> dict[int, str]:
    """Leave a text for the other processes of a mesh, and return those of all of them by rank.

    Raises:
        _AbsentError: some did not come within the time.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    ranks: list[int] = [*range(dist.get_world_size())]
    if mesh is not None:
        ranks = mesh.mesh.flatten().tolist()
    own = dist.get_rank()
    if len(ranks) < 2:
        return {own: text}
    if mesh is not None and mesh.device_type == "cuda":
        torch.cuda.synchronize()  # the parameters of the model itself were gathered: all have called it
    store, number = _get_default_store(), next(_counters[tuple(ranks)])
    place = f"hidrop_fx/schedule/{','.join(map(str, ranks))}"
    keys = {rank: f"{place}/{number}/{rank}" for rank in ranks}
    store.set(keys[own], text)
    wait = datetime.timedelta(seconds=WAIT_SECONDS if wait_seconds is None else wait_seconds)
    others = [keys[rank] for rank in ranks if rank != own]
    try:
        store.wait(others, wait)
    except Exception as error:  # of a type that depends on the store
        missing = [rank for rank in ranks if rank != own and not _is_there(store, keys[rank])]
        _counters[tuple(ranks)] = itertools.count(number)  # the others have not counted it either
        _take_back(store, keys[own])
        raise _AbsentError(missing, wait.total_seconds()) from error
    found = {rank: store.get(keys[rank]).decode() for rank in ranks}
    if number:  # all have come here, and so have read what was put there the time before
        store.delete_key(f"{place}/{number - 1}/{own}")
    return found


def _take_back(store: Any, key: str) -> None:
    try:
        store.delete_key(key)
    except Exception:  # the process that serves the store has gone
        return


def _is_there(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except Exception:  # the process that serves the store has gone
        return False


def _shown(text: str) -> str:
    """Name a schedule by its text, cut if it is long, with a hash of the whole."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text if len(text) <= 120 else text[:117] + '...'} [{digest}]"
