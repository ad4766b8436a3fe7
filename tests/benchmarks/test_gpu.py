"""The script for a GPU: its time is bounded, nothing it found is lost, and all of it runs on the simulated CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SIMULATED = """
import runpy, sys
import torch
from tests.support.simulated_cuda import streams
from tests.support.simulated_cuda.install import install
install()
streams.GENERATOR_STAYS_CAPTURED = torch.__version__ < "2.13"
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def answers(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Run entries (name, seconds that it may take, function) within so many minutes, and return their answers."""
    output = tmp_path / "found.json"

    def run(minutes: float, *entries: tuple[str, int, Any]) -> dict[str, Any]:
        made = [gpu.Entry(name=n, seconds=s, run=function) for n, s, function in entries]
        monkeypatch.setattr(gpu, "ENTRIES", made)
        given = ["--device", "cpu", "--minutes", str(minutes), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
        gpu.main()
        found: dict[str, Any] = json.loads(output.read_text())["entries"]
        return found

    return run


def test_an_entry_that_may_not_end_in_time_does_not_begin(answers: Any) -> None:
    found = answers(1, ("short", 50, lambda _: {"x": 1}), ("long", 70, lambda _: {"x": 2}))
    assert found["short"]["x"] == 1
    assert "may take 70 s" in found["long"]["left out"]


def test_an_entry_that_does_not_end_in_time_is_stopped(answers: Any) -> None:
    begun = time.perf_counter()
    found = answers(0.02, ("endless", 1, lambda _: time.sleep(60)), ("next", 1, lambda _: {}))
    assert time.perf_counter() - begun < 30
    assert found["endless"]["failed"].startswith("TimeoutError: stopped after 1 s")
    assert "may take 1 s" in found["next"]["left out"]


def test_what_was_found_is_on_disk_before_the_next_entry_begins(
    answers: Any, tmp_path: Path
) -> None:
    seen = []

    def fails(_: Any) -> dict[str, Any]:
        seen.append(json.loads((tmp_path / "found.json").read_text())["entries"])
        raise ValueError("no such kernel")

    found = answers(1, ("first", 1, lambda _: {"x": 1}), ("second", 1, fails))
    assert seen[0]["first"]["x"] == 1
    assert found["second"]["failed"] == "ValueError: no such kernel"


def test_the_questions_and_the_figures_that_decide_fit(gpu: Any) -> None:
    names = [entry.name for entry in gpu.ENTRIES]
    deciding = gpu.ENTRIES[: names.index("prefill_b1") + 1]
    assert {"failed_capture", "recorded_training", "prefill_b8", "decode_b1"} <= {
        entry.name for entry in deciding
    }
    assert sum(entry.seconds for entry in deciding) <= 9 * 60


@pytest.mark.slow
def test_every_entry_runs_on_the_simulation(tmp_path: Path) -> None:
    """Or says why it cannot there: kernels of CUDA, Inductor."""
    output = tmp_path / "found.json"
    given = ["--size", "tiny", "--compiler", "eager", "--rounds", "1", "--minutes", "60"]
    command = [sys.executable, "-c", SIMULATED, *given, "--output", str(output)]
    command += ["--schedule", "inject=1,prune=2:32,exit=3"]
    environment = {**os.environ, "TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())["entries"]
    without = {
        name: answer for name, answer in found.items() if {"left out", "failed"} & set(answer)
    }
    assert set(without) <= {"inductor", "varlen", "capacity"}, without
    assert without["inductor"]["left out"] == "needs Inductor"
    product = [v for name, v in found["failed_capture"].items() if name.startswith("the product's")]
    assert product[0].startswith("AcceleratorError")
    assert product[1:] == ["True", "works", "works", "works"]
    for name in ("prefill_b8", "decode_b8", "train_stage1"):
        assert set(found[name]["milliseconds"]) == {"hf", "hidrop_fx", "hidrop_fx_graphs"}
    trained = found["recorded_training"]
    norms = [trained[f"graphs={g}, nodes held={h}"] for g in (False, True) for h in (False, True)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-3)
