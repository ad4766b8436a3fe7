"""A model whose parameters two gloo processes shard with FSDP2, against one process with the rows of both.

Losses, every full gradient and the parameters behind three AdamW steps; tokens; and what is refused on every rank.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from tests.support.paths import ROOT
from tests.support.sharded import LIMIT, run_cases

EXACT = 1e-5
OTHERS = ("answers", "too_late", "different_schedules", "wrapped_by_plan")
SLOW = (
    *(
        "frozen_decoder",
        "compiled_first",
        "sharded_first",
        "dtopk",
        "frozen_without_images",
        "previous_layer",
    ),
    *("identity", "root_alone", "kept_gathered", "accumulated", "checkpointed", "adapters"),
    *("grouped_all", "grouped_and_frozen", "grouped_with_what_is_around", "wrapped"),
    *("mixed_precision", "ratios_of_their_own", "saved", "reconfigured", "qwen"),
    *("reduced_by_tower", "reduced_by_text"),
)
COMPILED = ("aot_eager", "inductor")


class Ran:
    """Cases that two processes ran, by name: what each rank returned."""

    def __init__(
        self,
        directory: Path,
        names: tuple[str, ...],
        module: str = "tests.distributed.cases",
        backend: str = "gloo",
        world: int = 2,
    ) -> None:
        self.directory, self.world = directory, world
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = (str(directory), port, module, list(names), LIMIT, backend, world)
        both = torch.multiprocessing.spawn(run_cases, given, nprocs=world, join=False)
        try:
            while not both.join():  # one has ended, the other not yet; each has a limit of its own
                pass
        except torch.multiprocessing.ProcessExitedException:
            pass  # what it saved tells

    def raw(self, name: str, rank: int) -> dict[str, Any]:
        path = self.directory / f"{name}.{rank}.pt"
        if not path.exists():
            pytest.fail(
                f"rank {rank} did not come to the end of {name}: {sorted(self.directory.iterdir())}"
            )
        found: dict[str, Any] = torch.load(path, weights_only=False)
        return found

    def __getitem__(self, name: str) -> tuple[Any, ...]:
        found = [self.raw(name, rank) for rank in range(self.world)]
        for rank, each in enumerate(found):
            assert "error" not in each, f"rank {rank}: {each['error']}"
        return tuple(each["value"] for each in found)


@pytest.fixture(scope="module")
def slowly(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("slow"), (*SLOW, *OTHERS))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("compiled"), COMPILED)


def check(found: tuple[Any, ...]) -> None:
    for each in found:
        for name in ("losses", "gradients", "parameters"):
            assert each.get(name, 0.0) < EXACT, (name, each)


@pytest.mark.slow
def test_a_plan_groups_layers(slowly: Ran) -> None:
    for found in slowly["wrapped_by_plan"]:
        assert found["together"] == [True, True, False, False]
        assert found["finite"]
        assert found["ratios"] == "torch.float32"


@pytest.mark.slow
def test_generate_equals_one_process_and_restore_leaves_nothing(slowly: Ran) -> None:
    for found in slowly["answers"]:
        assert torch.equal(found["found"], found["expected"])
        assert torch.equal(found["beams"], found["expected_beams"])
        assert found["logits"] < 1e-5
        assert found["restored"] < 1e-5
        assert found["left"] == []
        assert 0.45 < found["held"] < 0.55


@pytest.mark.slow
def test_ranks_with_different_schedules_are_told_so_at_once(slowly: Ran) -> None:
    for found in slowly["different_schedules"]:
        assert "rank 0: inject=1,exit=2" in found["message"]
        assert "rank 1: inject=1,exit=3" in found["message"]
        assert found["seconds"] < 30


@pytest.mark.slow
def test_units_that_no_call_reaches_are_refused(slowly: Ran) -> None:
    for found in slowly["too_late"]:
        assert "model.language_model.layers.1.mlp (FSDPLlamaMLP)" in found["inside"]
        assert "model.language_model (FSDPLlamaModel)" in found["around"]
        assert "model.vision_tower (FSDPCLIPVisionModel), whose hidden states" in found["tower"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_training_equals_one_process(slowly: Ran, name: str) -> None:
    found = slowly[name]
    check(found)
    for each in found:
        if name == "wrapped":
            assert each["tokens"] == each["wanted"]
            layers = {f"model.language_model.layers.{i}" for i in range(4)}
            assert {*layers, "", "hidrop_ratios", "lm_head"} <= set(each["units"])
            assert sum("vision_tower" in unit for unit in each["units"]) == 2
            again, number, asked = each["messages"]
            assert "is sharded already" in again
            assert "group_shallow=9: pass True, False, or how many of the 4 layers" in number
            assert "compile the model first, pass costs=" in asked
        if name == "reduced_by_tower":
            assert each["tokens"] == each["wanted"]
        if name == "saved":
            assert each["found"] < 1e-6
            assert each["ratios"] == 0
        if name == "reconfigured":
            assert each["lines"] == 1, each


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_equals_one_process_and_compiles_once(compiled: Ran, name: str) -> None:
    check(compiled[name])


@pytest.mark.slow
def test_a_schedule_on_one_rank_alone_is_an_error(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ("one_rank_alone",))
    assert (
        "rank 1 came to no call of a compiled one within 5 s"
        in ran.raw("one_rank_alone", 0)["error"]
    )
    assert "value" not in ran.raw("one_rank_alone", 1)


@pytest.mark.slow
def test_the_command_of_the_page_trains_and_saves(tmp_path: Path) -> None:
    """Uncompiled, to be done in a minute; its checkpoint loads in plain transformers, and under its schedule."""
    page = (ROOT / "docs" / "scale-out.md").read_text()
    command = re.findall(r"^```bash\n(torchrun .*)\n```", page, re.MULTILINE)[0]
    _, *rest = shlex.split(command)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    launched = [sys.executable, "-m", "torch.distributed.run", *rest, "--backend", "eager"]
    done = subprocess.run(
        launched,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [
        float(loss) for loss in re.findall(r"^step \d: loss ([\d.]+)", done.stdout, re.MULTILINE)
    ]
    assert len(losses) == 2
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    shipped = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    moved = [
        not torch.equal(p, q) for p, q in zip(plain.parameters(), shipped.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    hidrop.load(plain, tmp_path / "checkpoint")
    assert "inject" in str(hidrop.schedules(plain)["default"])
