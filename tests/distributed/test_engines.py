"""The engines that call `fully_shard` themselves, on two gloo processes, against one process with the rows of both.

accelerate takes its FSDP2 plug-in on accelerators alone; `tests/support/sharding_accelerate.py` lets it run on CPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from tests.distributed.test_fsdp2 import Ran, check
from tests.support.paths import ROOT

MODULE = "tests.distributed.engine_cases"
SLOW = (
    *("trainer_saving", "accelerate_checkpointing", "accelerate_loading", "accelerate_bf16"),
    *("bf16_ratios", "trainer_checkpointing", "trainer_sharded_files", "trl"),
    *("hybrid", "offloaded", "changed", "trainer_alone_saving"),
)
EQUAL = (
    *("accelerate_checkpointing", "accelerate_loading", "trainer_checkpointing"),
    *("trainer_sharded_files", "trl", "hybrid", "offloaded"),
)


@pytest.fixture(scope="module")
def slowly(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    pytest.importorskip("accelerate", reason="accelerate, an optional dependency, is not installed")
    pytest.importorskip("trl", reason="trl, an optional dependency, is not installed")
    return Ran(tmp_path_factory.mktemp("engines"), SLOW, MODULE)


@pytest.mark.slow
def test_trainer_equals_one_process_and_what_it_saves_goes_on_sharded_and_alone(
    slowly: Ran,
) -> None:
    check(slowly["trainer_saving"])
    for found in slowly["trainer_saving"]:
        assert found["count"] == 44  # the ratios' too
        assert found["resumed"] < 1e-5
        assert {"model.safetensors", "hidrop.json", "hidrop.safetensors"} <= set(found["files"])
        assert found["selection"] == "dtopk"
        assert found["answers"]
        assert found["stepped"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_training_equals_one_process(slowly: Ran, name: str) -> None:
    check(slowly[name])
    for found in slowly[name]:
        if name == "accelerate_checkpointing":
            assert "CheckpointWrapper" in found["wrapped"]
            assert found["recomputed"] == 1
        if name == "trainer_sharded_files":
            assert found["resumed"] < 1e-5
            assert found["parts"] == 3  # one a process, and what is in them
        if name == "offloaded":
            assert found["tokens"] == found["wanted"]


@pytest.mark.slow
def test_mixed_precision_of_accelerate_is_plain_transformers_bit_by_bit(slowly: Ran) -> None:
    for found in slowly["accelerate_bf16"]:
        assert found["losses"] == found["gradients"] == 0
        assert found["dtype"] == "torch.float32"


@pytest.mark.slow
def test_mixed_precision_rounds_no_ratios_whatever_units_return(slowly: Ran) -> None:
    for found in slowly["bf16_ratios"]:
        assert found["gradients"] == 0
        assert found["count"] > 36
        assert found["dtype"] == "torch.float32"


@pytest.mark.slow
def test_a_change_of_schedule_is_compared_once_and_one_that_ranks_make_differently_is_told(
    slowly: Ran,
) -> None:
    for found in slowly["changed"]:
        assert found["counts"] == [1, 1, 2, 2, 3, 4]
        assert "rank 0: inject=1,prune=2:6,exit=3" in found["message"]
        assert "rank 1: inject=1,exit=3" in found["message"]


@pytest.mark.slow
def test_a_change_on_one_rank_alone_is_an_error(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ("one_changes",), MODULE)
    told = ran.raw("one_changes", 0)["error"]
    assert "rank 0 changes to the schedule inject=1,exit=2" in told
    assert "rank 1 came to no change within 4 s" in told
    assert "value" not in ran.raw("one_changes", 1)


@pytest.mark.slow
def test_ratios_that_one_process_saves_alone_are_an_error_and_no_waiting(slowly: Ran) -> None:
    first, second = slowly["trainer_alone_saving"]
    assert "rank 1 did not within 2 s" in first["message"]
    assert "TrainerCallback" in first["message"]
    assert second["message"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_the_example_trains_and_saves_on_two_processes(tmp_path: Path, launcher: str) -> None:
    """Sharded, uncompiled, two steps; the checkpoint loads in plain transformers and under its schedule."""
    script = [str(ROOT / "examples" / "train_llava.py"), "--demo-samples", "16", "--batch", "8"]
    script += ["--micro-batch", "2", "--max-steps", "2", "--save-every", "2", "--backend", "eager"]
    script += ["--output", str(tmp_path / "trained")]
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731"]
        script += ["--fsdp"]
    else:
        config = str(ROOT / "examples" / "fsdp2.yaml")
        start = ["accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
        start += ["--mixed_precision", "no", "--main_process_port", "29732"]
    command = [sys.executable, "-m", *start, str(ROOT / "tests" / "distributed" / "on_cpu.py")]
    done = subprocess.run(
        [*command, *script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = tmp_path / "trained"
    assert (saved / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "it was not sharded"
    plain: Any = LlavaForConditionalGeneration.from_pretrained(saved)
    shipped: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    pairs = zip(plain.named_parameters(), shipped.named_parameters(), strict=True)
    moved = {name.split(".")[1] for (name, new), (_, old) in pairs if not torch.equal(new, old)}
    assert moved == {"multi_modal_projector", "language_model"}
    hidrop.load(plain, saved, backend="eager")
    assert "inject" in str(hidrop.schedules(plain)["default"])
