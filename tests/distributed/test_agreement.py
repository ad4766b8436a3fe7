"""Processes of several meshes compare their schedules under one name in each mesh."""

from collections import defaultdict
from datetime import timedelta
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hidrop_fx.distributed import agreement


class Agreeing:
    """A store in which every other process runs the same, and which notes what is put there."""

    def __init__(self) -> None:
        self.put: list[str] = []

    def set(self, key: str, text: str) -> None:
        self.put.append(key)
        self.text = text

    def wait(self, keys: list[str], time: timedelta) -> None:
        self.waited = keys

    def delete_key(self, key: str) -> None:
        self.deleted = key

    def get(self, key: str) -> bytes:
        return self.text.encode()


def compare_as(rank: int, meshes: list[list[int]], patch: pytest.MonkeyPatch) -> Agreeing:
    """Compare in some meshes, one after the other, as a process that has just begun."""
    store: Any = Agreeing()
    patch.setattr(dist, "get_world_size", lambda: 4)
    patch.setattr(dist, "get_rank", lambda: rank)
    patch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    patch.setattr(agreement, "_counters", defaultdict(count))
    for ranks in meshes:
        mesh = SimpleNamespace(mesh=torch.tensor(ranks), device_type="cpu")
        agreement.check_agreement(mesh, "identity")
    return store


def test_a_mesh_is_counted_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare_as(0, [[0, 1], [0, 1], [0, 1, 2, 3]], monkeypatch)
    last = compare_as(3, [[0, 1, 2, 3]], monkeypatch)
    assert len(set(first.put)) == 3
    assert last.put[0] in first.waited
    assert first.put[2] in last.waited
