"""FSDP2 over NCCL: on one GPU with one process, on two with two; the same numbers as one process on one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_fsdp2 import Ran

CLOSE = 1e-4  # sums on a GPU are in another order


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    world = request.param
    there = torch.cuda.device_count()
    if there < world:
        pytest.skip(f"NCCL takes a GPU a process: {world} wanted, {there} here")
    pytest.importorskip("accelerate", reason="accelerate, an optional dependency, is not installed")
    directory: Path = tmp_path_factory.mktemp("nccl")
    names = ("eager", "inductor", "offloaded", "trainer")
    return Ran(
        directory,
        names,
        "tests.distributed.nccl_cases",
        backend="cuda:nccl,cpu:gloo",
        world=world,
    )


@pytest.mark.parametrize("name", ["eager", "inductor", "offloaded", "trainer"])
def test_training_and_answers_equal_one_process(ran: Ran, name: str) -> None:
    for found in ran[name]:
        assert found.get("gradients", 0.0) < CLOSE
        assert found["parameters"] < CLOSE
        assert found.get("tokens", True)
