"""`torchrun -m hidrop_fx`: two processes answer as one does, in order; one compiles for both; an error ends both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.asked import NEW_TOKENS, write_model, write_questions
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

COUNT = 7
SCHEDULE = "inject=1,exit=2"
COUNTED = """
import json, os, sys
rank, folder = os.environ["RANK"], sys.argv.pop(1)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache{rank}"
from hidrop_fx.cli import app
app(sys.argv[1:], standalone_mode=False)
from torch._dynamo.utils import counters
found = dict(counters["inductor"]) | dict(counters["aot_autograd"])
open(f"{folder}/counters{rank}", "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("asked")
    write_questions(directory, write_model(directory / "model"), COUNT)
    return directory


def launched(*command: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*start, "--nproc-per-node", str(processes), *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def given(folder: Path, *more: object) -> tuple[object, ...]:
    return (
        *("--model", folder / "model", "--data", folder / "questions.json"),
        *("--max-new-tokens", NEW_TOKENS, "--batch-size", 2, "--schedule", SCHEDULE, *more),
    )


def test_two_processes_evaluate_as_one_does(folder: Path) -> None:
    lines: dict[int, list[dict[str, Any]]] = {}
    for count in (1, 2):
        out = folder / f"out{count}"
        options = given(folder, "--backend", "eager", "--output", out)
        done = launched("-m", "hidrop_fx", "eval", *options, processes=count)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| vanilla | 100 | 1.000 | 144.0 |") == 1
        assert done.stdout.count("| method |") == 1
        assert done.stderr.count(f"{2 * COUNT}/{2 * COUNT}") >= 1
        assert done.stderr.count(f" 0/{2 * COUNT} ") <= 2  # one bar
        lines[count] = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
        for line in lines[count]:
            del line["seconds"]
    assert lines[1] == lines[2]
    assert [line["index"] for line in lines[2]] == [*range(COUNT), *range(COUNT)]


def test_an_error_of_one_ends_both_with_it(folder: Path, tmp_path: Path) -> None:
    """The second process's part holds a file that is no picture."""
    entries = json.loads((folder / "questions.json").read_text())
    entries[2]["image"] = "broken.png"
    (folder / "broken.png").write_bytes(b"no picture")
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(entries))
    options = ("--model", folder / "model", "--data", data, "--images", folder, "--batch-size", 2)
    more = ("--schedule", SCHEDULE, "--backend", "eager", "--output", tmp_path / "answers")
    done = launched("-m", "hidrop_fx", "run", *options, *more)
    assert done.returncode != 0
    assert "broken.png is not an image that Pillow can read" in done.stderr
    assert not (tmp_path / "answers").exists()


def test_one_process_compiles_for_both(folder: Path, tmp_path: Path) -> None:
    """Each has a cache directory of its own, as on two machines: the second finds all of its code in what the first sent.

    Six questions, since of seven the last would be a batch of one row, which is a program of its own.
    """
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(json.loads((folder / "questions.json").read_text())[:6]))
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    more = ("--data", data, "--images", folder, "--output", tmp_path / "answers")
    done = launched(script, tmp_path, "run", *given(folder, *more))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"counters{rank}").read_text()) for rank in (0, 1))
    assert first["autograd_cache_miss"] >= 1
    assert "autograd_cache_miss" not in second
    assert "fxgraph_cache_miss" not in second
    assert second["autograd_cache_hit"] == first["autograd_cache_miss"]
    lines = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
