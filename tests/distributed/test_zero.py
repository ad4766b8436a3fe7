"""A model that DeepSpeed trains by ZeRO-2 or ZeRO-3 on two gloo processes, against one process with the rows of both.

Losses, every whole gradient and the parameters behind three AdamW steps; tokens; what is saved; and what is refused on every rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from tests.distributed.test_fsdp2 import Ran, check
from tests.support.paths import ROOT

MODULE = "tests.distributed.zero_cases"
FIRST = ("zero3", "zero2")
EQUAL = (
    *("engine_first", "zero2_engine_first", "previous_layer", "leaves", "frozen_decoder"),
    *("frozen_without_images", "checkpointed", "kept", "offloaded", "accumulated", "adapters"),
    *("loaded", "accelerated", "reduced_by_tower", "reduced_by_text"),
)
TRAINED = ("trainer3", "trainer2")
OTHERS = ("answers", "order", "wrong", "sixteen")
COMPILED = ("aot_eager", "inductor")

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed, which is no dependency, is not installed"
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("zero"), FIRST, MODULE)


@pytest.fixture(scope="module")
def slowly(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("slow"), (*EQUAL, *OTHERS), MODULE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("trained"), TRAINED, MODULE)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("compiled"), COMPILED, MODULE)


@pytest.mark.parametrize("name", FIRST)
def test_training_and_answers_equal_one_process(ran: Ran, name: str) -> None:
    check(ran[name])
    for found in ran[name]:
        assert found["count"] > 80  # the ratios' too
        assert found["tokens"] == found["wanted"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_training_equals_one_process(slowly: Ran, name: str) -> None:
    check(slowly[name])
    for found in slowly[name]:
        if "tokens" in found:
            assert found["tokens"] == found["wanted"]
        if name == "loaded":
            assert found["empty"]
            assert found["stage"]
            assert "is partitioned by ZeRO-3 where it is read" in found["message"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trainer_equals_one_process_and_what_it_saves_goes_on_under_it_and_alone(
    trained: Ran, name: str
) -> None:
    check(trained[name])
    for found in trained[name]:
        assert found["resumed"] < 1e-5
        assert {"model.safetensors", "hidrop.json", "hidrop.safetensors"} <= set(found["files"])
        assert found["extra"] == []
        assert found["selection"] == "dtopk"
        assert found["bare"] == 0
        assert found["answers"]
        assert found["stepped"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_equals_one_process_and_compiles_once(compiled: Ran, name: str) -> None:
    check(compiled[name])


@pytest.mark.slow
def test_generate_equals_one_process_and_restore_leaves_nothing(slowly: Ran) -> None:
    for found in slowly["answers"]:
        assert found["found"] == found["expected"]
        assert found["logits"] < 1e-5
        assert found["restored"] < 1e-5
        assert found["left"] == []


@pytest.mark.slow
def test_a_rank_without_images_runs_its_modules_in_the_order_of_the_others(slowly: Ran) -> None:
    first, second = slowly["order"]
    assert first == second
    assert first["zero2"] == first["fully_shard"] == ["image", "tokens"]
    assert sorted(first["zero3"]) == ["image", "tokens"]


@pytest.mark.slow
def test_learned_ratios_of_a_16_bit_model_are_the_optimizers_fp32_values(slowly: Ran) -> None:
    """bf16 has steps of 0.0039 at 0.5: three steps of Adam at a rate of 0.001 would be lost, or rounded."""
    first, second = slowly["sixteen"]
    assert first[2]["ratios"] == second[2]["ratios"]
    assert first[3]["ratios"] == second[3]["ratios"]
    for found in (first, second):
        for stage in (2, 3):
            each = found[stage]
            assert each["dtype"] == "torch.bfloat16"
            assert each["losses"] < 0.1
            assert each["saved"] == pytest.approx(each["ratios"], abs=1e-7)
            pairs = zip(each["ratios"], found["expected"], found["start"], strict=True)
            for ratio, expected, start in pairs:
                rounded = float(torch.tensor(start).bfloat16())
                assert ratio - rounded == pytest.approx(expected - start, abs=3e-4)


@pytest.mark.slow
def test_ranks_that_differ_are_told_so_at_once(slowly: Ran) -> None:
    for found in slowly["wrong"]:
        assert "rank 0: inject=1,exit=2" in found["different"]
        assert "rank 1: inject=1,exit=3" in found["different"]
        assert found["seconds"] < 30
        assert "is partitioned by ZeRO-3 where it is read" in found["past"]


@pytest.mark.slow
def test_a_schedule_on_one_rank_alone_is_an_error(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ("one_rank_alone",), MODULE)
    assert (
        "rank 1 came to no call of a compiled one within 5 s"
        in ran.raw("one_rank_alone", 0)["error"]
    )
    assert "value" not in ran.raw("one_rank_alone", 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate launch"])
def test_the_example_trains_and_saves_on_two_processes(tmp_path: Path, launcher: str) -> None:
    """Two steps, uncompiled; the checkpoint loads in plain transformers and under its schedule."""
    script = [str(ROOT / "examples" / "train_llava.py"), "--demo-samples", "16", "--batch", "8"]
    script += ["--micro-batch", "2", "--max-steps", "2", "--save-every", "2", "--backend", "eager"]
    script += ["--output", str(tmp_path / "trained")]
    stage = 2 if launcher == "torchrun" else 3
    config = str(ROOT / "examples" / f"zero{stage}.json")
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29741"]
    elif launcher == "deepspeed":
        start = ["deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"]
        start += ["--master_port", "29742"]
    else:
        start = ["accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2"]
        start += ["--deepspeed_config_file", config, "--main_process_port", "29743"]
    if launcher != "accelerate launch":
        script += ["--deepspeed", config]
    command = [sys.executable, "-m", *start, str(ROOT / "tests" / "distributed" / "on_cpu.py")]
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, *script],
        cwd=tmp_path,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = tmp_path / "trained"
    parts = [
        path.name for path in (saved / "checkpoint-2" / "global_step2").glob("*optim_states.pt")
    ]
    assert len(parts) == 2, "each process has its part of the optimizer"
    plain: Any = LlavaForConditionalGeneration.from_pretrained(saved)
    shipped: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    pairs = zip(plain.named_parameters(), shipped.named_parameters(), strict=True)
    moved = {name.split(".")[1] for (name, new), (_, old) in pairs if not torch.equal(new, old)}
    assert moved == {"multi_modal_projector", "language_model"}
    hidrop.load(plain, saved, backend="eager")
    assert "inject" in str(hidrop.schedules(plain)["default"])
