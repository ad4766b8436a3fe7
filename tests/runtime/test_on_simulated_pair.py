"""The tests of a model on two GPUs, on two simulated ones: in a process of its own, since the simulation replaces torch.cuda."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PLUGIN = ["-p", "tests.support.simulated_cuda.plugin", "-p", "no:cacheprovider"]
TESTS = ["tests/runtime/test_several_devices.py", "tests/passes/test_place_layers.py"]
DEFAULT = "answers and to and dispatched"


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(DEFAULT, id="default"),
        pytest.param(f"not ({DEFAULT})", id="the rest", marks=pytest.mark.slow),
    ],
)
def test_tests_of_two_devices_pass_on_the_simulation(chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "--show-capture=no", *PLUGIN, *TESTS]
    done = subprocess.run(
        [*command, "-k", chosen], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
