"""The script for the paper's benchmarks: its commands are what this package and lmms-eval read; its table, on made results."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hidrop_fx.cli import app
from hidrop_fx.evaluation.lmms_arguments import read_model_args
from hidrop_fx.evaluation.loading import VANILLA
from hidrop_fx.schedule.presets import PRESETS
from tests.support.paths import ROOT

sys.path.append(str(ROOT / "examples"))
import reproduce_table

SCRIPT = ROOT / "examples" / "reproduce_paper.sh"
MODELS = ["llava-v1.5-7b", "hidrop-80", "hidrop-64", "hidrop-48"]


def commands(tmp_path: Path) -> list[list[str]]:
    given = ["in a folder", "tower", str(tmp_path), "--limit", "5"]
    done = subprocess.run(
        ["bash", str(SCRIPT), *given],
        env=os.environ | {"DRY_RUN": "1", "BATCH_SIZE": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_script_is_bash_and_says_how_it_is_called() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "reproduce_paper.sh CHECKPOINTS TOWER OUTPUT" in done.stderr


def test_each_checkpoint_is_imported_and_evaluated(tmp_path: Path) -> None:
    *found, last = commands(tmp_path)
    assert last == ["python", str(SCRIPT.with_name("reproduce_table.py")), f"{tmp_path}/results"]
    group = typer.main.get_command(app)
    for i, name in enumerate(MODELS):
        imported, evaluated = found[2 * i : 2 * i + 2]
        assert imported[:2] == ["hidrop", "import-llava"]
        command = group.commands["import-llava"]  # type: ignore[attr-defined]
        read = command.make_context("import-llava", imported[2:]).params
        assert str(read["checkpoint"]) == f"in a folder/{name}"
        assert str(read["output"]) == f"{tmp_path}/models/{name}"
        assert read["schedule"] == ("identity" if name == MODELS[0] else name)
        assert evaluated[:5] == ["accelerate", "launch", "--num_processes", "1", "-m"]
        text = evaluated[evaluated.index("--model_args") + 1]
        arguments = read_model_args(text, lambda pretrained, schedule, batch_size: None)
        schedule = VANILLA if name == MODELS[0] else name
        assert arguments == {
            "pretrained": f"{tmp_path}/models/{name}",
            "schedule": schedule,
            "batch_size": "3",
        }
        assert schedule in (*PRESETS, VANILLA)


def test_lmms_eval_reads_its_commands(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    evaluated = [one[6:] for one in commands(tmp_path) if "lmms_eval" in one]
    code = (
        "import json, sys\n"
        "from lmms_eval.__main__ import parse_eval_args\n"
        "from lmms_eval.tasks import TaskManager\n"
        "read = []\n"
        "for one in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = one\n"
        "    read.append(vars(parse_eval_args()[1]))\n"
        "known = set(TaskManager('ERROR').all_tasks)\n"
        "missing = [t for one in read for t in one['tasks'].split(',') if t not in known]\n"
        "print(json.dumps([missing, read], default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(evaluated)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    missing, read = json.loads(done.stdout.splitlines()[-1])
    assert missing == []
    tasks = {task for task, *_ in reproduce_table.BENCHMARKS.values()}
    for one, name in zip(read, MODELS, strict=True):
        assert one["model"] == "hidrop"
        assert set(one["tasks"].split(",")) == tasks
        assert len(tasks) == 11
        assert one["output_path"] == f"{tmp_path}/results/{name}"
        assert one["log_samples"] is True
        assert one["limit"] == 5


def write(directory: Path, date: str, **scores: dict[str, float | str]) -> None:
    path = directory / "some__model" / f"{date}_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": scores}))


def test_the_table_holds_shares_of_the_plain_scores(tmp_path: Path) -> None:
    plain = tmp_path / "llava-v1.5-7b"
    gqa, mme = {"alias": "gqa", "exact_match,none": 0.62}, {"mme_perception_score,none": 1500.0}
    write(plain, "20260101_000000", gqa={"exact_match,none": 0.1}, mme=mme)
    write(plain, "20260102_000000", gqa=gqa)  # run again
    write(
        tmp_path / "hidrop-64",
        "20260101_000000",
        gqa={"exact_match,none": 0.589, "exact_match_stderr,none": 0.01},
        mme={"mme_cognition_score,none": 300.0, "mme_perception_score,none": 1350.0},
    )
    write(tmp_path / "hidrop-48", "20260101_000000", pope={"pope_f1_score,none": 0.8})
    found = reproduce_table.table(tmp_path)
    assert "| GQA | 62.0 | - | 58.9 (95.0 %) | - |" in found
    assert "| MME | 1500.0 | - | 1350.0 (90.0 %) | - |" in found
    assert "| POPE | - | - | - | 80.0 |" in found
    assert "| average | 100.0 % of 2 | - | 92.5 % of 2 | - |" in found
    assert "| the paper's | 100 % | 98.4 % | 98.3 % | 96.5 % |" in found
    with pytest.raises(SystemExit, match=r"no results of llava-v1\.5-7b"):
        reproduce_table.table(tmp_path / "hidrop-64")


def test_the_average_over_all_benchmarks_stands_alone(tmp_path: Path) -> None:
    for name, factor in (("llava-v1.5-7b", 1.0), *((name, 0.9) for name in MODELS[1:])):
        for i, (task, metric, _) in enumerate(reproduce_table.BENCHMARKS.values()):
            write(
                tmp_path / name,
                f"2026010{i}_000000",
                **{task: {f"{metric},none": factor * (i + 1)}},
            )
    last = reproduce_table.table(tmp_path).splitlines()[-2]
    assert last == "| average | 100.0 % | 90.0 % | 90.0 % | 90.0 % |"
