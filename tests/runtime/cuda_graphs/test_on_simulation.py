"""The tests of CUDA, on the simulated one: in a process of its own, since the simulation replaces torch.cuda."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PLUGIN = ["-p", "tests.support.simulated_cuda.plugin", "-p", "no:cacheprovider"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/runtime/cuda_graphs/test_simulated.py"],
        ["tests/runtime/cuda_graphs/test_training.py", "-k", "not cpu"],
        ["tests/runtime/cuda_graphs/test_generation.py", "-k", "not cpu"],
        ["tests/passes/test_overlap_vision.py", "-k", "cuda"],
    ],
    ids=lambda tests: Path(tests[0]).stem,
)
def test_tests_of_cuda_pass_on_the_simulation(tests: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", *PLUGIN, *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
