"""A model whose heads and channels two gloo processes divide, as transformers' tensor parallelism does, against one process.

Losses, every full gradient and the parameters behind three AdamW steps; tokens, also those of each method; and that both
processes choose alike.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from tests.distributed.divided_cases import METHODS
from tests.distributed.test_fsdp2 import Ran, check
from tests.support.paths import ROOT

TRAINING = (
    "learned",
    "fixed",
    "biases",
    "windows",
    "soft_ranks",
    "identity",
    "gathered",
    "projector_alone",
)
TRAINING += ("experts", "phi", "capped")
TRAINING += ("checkpointed", "accumulated", "trained_before")
OTHERS = ("methods", "drawn", "refused", "loaded", "reconfigured")
COMPILED = ("aot_eager", "inductor")
MODULE = "tests.distributed.divided_cases"


@pytest.fixture(scope="module")
def slowly(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("slow"), (*TRAINING, *OTHERS), MODULE)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("compiled"), COMPILED, MODULE)


def check_both(found: tuple[Any, Any]) -> None:
    check(found)
    for each in found:
        assert each.get("tokens") == each.get("wanted")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_training_equals_one_process(slowly: Ran, name: str) -> None:
    check_both(slowly[name])


@pytest.mark.slow
@pytest.mark.parametrize("text", METHODS)
def test_a_method_answers_as_in_one_process(slowly: Ran, text: str) -> None:
    for found in slowly["methods"]:
        distance, same = found[text]
        assert distance < 1e-5
        assert same


@pytest.mark.slow
def test_drawn_tokens_are_the_same_in_both_processes(slowly: Ran) -> None:
    for found in slowly["drawn"]:
        assert found == {"same": True, "anew": True}


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused_in_both_processes(slowly: Ran) -> None:
    for found in slowly["refused"]:
        assert (
            "k_proj (Linear) of the text decoder makes 1 heads of 8 channels, which 2 processes"
            in found["heads"]
        )
        assert "rank 0: inject=1,exit=2" in found["schedules"]
        assert "rank 1: inject=1,exit=3" in found["schedules"]
        assert "hidrop.compare with a plain loop" in found["compare"]


@pytest.mark.slow
def test_a_loaded_model_is_divided_and_its_checkpoint_is_whole(slowly: Ran) -> None:
    for found in slowly["loaded"]:
        assert max(found["distances"]) < 1e-5
        assert found["ratios"]
        assert found["goes_on"]
        assert found["held"] < 0.75  # the tower is whole in each


@pytest.mark.slow
def test_graphs_and_the_vision_lane_are_left_off_and_caches_hold_half_the_heads(
    slowly: Ran,
) -> None:
    for found in slowly["reconfigured"]:
        assert found == {"lines": [1, 1], "equal": True, "share": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_equals_one_process_and_compiles_once(compiled: Ran, name: str) -> None:
    check_both(compiled[name])


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two processes"
)
def test_two_gpus_over_nccl_equal_one(tmp_path: Path) -> None:
    check_both(Ran(tmp_path, ("on_gpus",), MODULE, "nccl")["on_gpus"])


@pytest.mark.slow
def test_the_command_of_the_page_answers_trains_and_saves(tmp_path: Path) -> None:
    """Uncompiled, to be done in a minute; its checkpoint loads in plain transformers, and under its schedule."""
    page = (ROOT / "docs" / "scale-out.md").read_text()
    command = re.findall(r"^```bash\n(torchrun .*tensor_parallel.*)\n```", page, re.MULTILINE)[0]
    _, *rest = shlex.split(command)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    launched = [sys.executable, "-m", "torch.distributed.run", *rest, "--backend", "eager"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launched, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^answers: \[", done.stdout, re.MULTILINE)
    losses = re.findall(r"^step \d: loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert len(losses) == 2
    from transformers import LlavaForConditionalGeneration

    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    shipped = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    moved = [
        not torch.equal(p, q) for p, q in zip(plain.parameters(), shipped.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    hidrop.load(plain, tmp_path / "checkpoint")
    assert "inject" in str(hidrop.schedules(plain)["default"])
