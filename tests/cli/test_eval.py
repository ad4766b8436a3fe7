"""`hidrop eval` and `hidrop run --data` in one process: lines, table, what goes on where it stopped, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hidrop_fx.cli import evaluation, lmms_hand_over
from hidrop_fx.cli.evaluation import is_right
from tests.cli.test_cli import error_of, succeeds
from tests.support.asked import NEW_TOKENS, write_model, write_questions

torch.set_num_threads(1)

COUNT = 7
SCHEDULE = "inject=1,exit=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("asked")
    write_questions(directory, write_model(directory / "model"), COUNT)
    return directory


def given(folder: Path, *more: object) -> tuple[object, ...]:
    return (
        *("--model", folder / "model", "--data", folder / "questions.json", "--backend", "eager"),
        *("--max-new-tokens", NEW_TOKENS, "--batch-size", 3, *more),
    )


@pytest.fixture(scope="module")
def done(folder: Path) -> list[dict[str, Any]]:
    schedules = ("--schedule", "identity", "--schedule", SCHEDULE)
    found = succeeds("eval", *given(folder, *schedules, "--output", folder / "out", "--json"))
    rows: list[dict[str, Any]] = json.loads(found.stdout)
    return rows


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def test_eval_measures_each_method(folder: Path, done: list[dict[str, Any]]) -> None:
    assert [(row["method"], row["budget"]) for row in done] == [
        ("vanilla", "100"),
        ("identity", "own"),
        (SCHEDULE, "own"),
    ]
    assert [row["vision_tokens"] for row in done] == [144, 144, 48]  # one layer of three
    # Right answers are those of the plain model, asked one by one.
    assert [row["accuracy"] for row in done[:2]] == [1.0, 1.0]
    assert done[2]["accuracy"] < 1
    lines = lines_of(folder / "out")
    assert [(line["method"], line["index"]) for line in lines] == [
        (row["method"], index) for row in done for index in range(COUNT)
    ]
    entries = json.loads((folder / "questions.json").read_text())
    for line in lines:
        asked, answered = (turn["value"] for turn in entries[line["index"]]["conversations"])
        assert (f"<image>\n{line['question']}", line["expected"]) == (asked, answered)
        assert line["right"] == (line["answer"] == line["expected"])
    for row in done:
        own = [line for line in lines if line["method"] == row["method"]]
        assert row["accuracy"] == sum(line["right"] for line in own) / COUNT
        assert row["seconds"] == pytest.approx(sum(line["seconds"] for line in own) / COUNT)
        assert row["questions"] == COUNT


def test_eval_goes_on_where_it_stopped(folder: Path, done: list[dict[str, Any]]) -> None:
    lines = lines_of(folder / "out")
    again = folder / "again"
    again.mkdir()
    (again / "settings.json").write_bytes((folder / "out" / "settings.json").read_bytes())
    # Killed within the fifth line of a method, behind one that was whole.
    kept = [*lines[:COUNT], *lines[2 * COUNT : 2 * COUNT + 4]]
    kept[1] = {**kept[1], "question": "Another?"}  # the file had another then
    schedules = ("--schedule", "identity", "--schedule", SCHEDULE)
    text = "".join(json.dumps(line) + "\n" for line in kept) + json.dumps(lines[-1])[:40]
    (again / "samples.jsonl").write_text(text)
    result = succeeds("eval", *given(folder, *schedules, "--output", again))
    del kept[1]
    found = lines_of(again)
    assert len(found) == 3 * COUNT
    assert [line for line in found if line in kept] == kept  # their seconds, too: not asked again
    assert [line["answer"] for line in found] == [line["answer"] for line in lines]
    for row in done:
        assert f"| {row['method']} | {row['budget']} | {row['accuracy']:.3f} |" in result.stdout
    assert "100%" in result.stderr


def test_eval_of_what_is_done_loads_no_model(
    folder: Path, done: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(evaluation, "load_everywhere")
    schedules = ("--schedule", "identity", "--schedule", SCHEDULE)
    found = succeeds("eval", *given(folder, *schedules, "--output", folder / "out", "--json"))
    assert json.loads(found.stdout) == done
    assert "question" not in found.stderr  # no bar beside JSON


def test_answers_of_weights_that_were_written_anew_are_not_mixed(
    folder: Path, done: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A model that was trained on into its own directory has its name still; so has a file of questions its own."""
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    again = given(folder, "--schedule", SCHEDULE, "--output", out)
    weights = folder / "model" / "model.safetensors"
    before = weights.stat()
    os.utime(weights, (before.st_atime, before.st_mtime + 60))
    try:
        assert re.search(
            r"written '20.*', now '20.*': name another --output", error_of("eval", *again)
        )
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    for option, value in (("--images", tmp_path), ("--attn-implementation", "eager")):
        said = error_of("eval", *again, option, value)
        assert f"now {str(value)!r}: name another --output" in said
    succeeds("eval", *again)


def test_eval_refuses_what_it_cannot_measure(
    folder: Path, done: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = ("--output", folder / "out")
    changed = given(folder, "--schedule", SCHEDULE, *out, "--dtype", "bfloat16")
    assert "dtype 'auto', now 'bfloat16': name another --output" in error_of("eval", *changed)
    assert "pass --schedule, once or more" in error_of("eval", *given(folder, *out))
    assert "--data is missing" in error_of("eval", "--model", folder / "model", *out)
    unknown = error_of("eval", "--method", "fastw", "--output", tmp_path / "a")
    assert "--method 'fastw' is none of vanilla; shipped; hidrop" in unknown
    assert "--budget '12' is none of 100;" in error_of("eval", "--budget", "12", *out)
    without = error_of("eval", "--method", "snapkv", "--budget", 8, "--output", tmp_path / "b")
    assert "--method snapkv has no budget 8: it has 11 kv, 8 kv" in without
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "samples.jsonl").write_text("{}\n")
    schedule = ("--schedule", SCHEDULE, "--output", broken)
    assert "has no settings.json beside it" in error_of("eval", *given(folder, *schedule))
    (broken / "settings.json").write_bytes((folder / "out" / "settings.json").read_bytes())
    assert "line 1 of" in error_of("eval", *given(folder, *schedule))
    bare = tmp_path / "bare.json"
    entries = json.loads((folder / "questions.json").read_text())
    entries[1]["conversations"].pop()
    bare.write_text(json.dumps(entries))
    files = ("--data", bare, "--images", folder, "--schedule", SCHEDULE, "--output", tmp_path / "c")
    assert "1 of 7 records of" in error_of("eval", "--model", folder / "model", *files)


def test_run_answers_the_questions_of_a_file_in_order(folder: Path, tmp_path: Path) -> None:
    entries = json.loads((folder / "questions.json").read_text())
    output = tmp_path / "answers.jsonl"
    wanted = ("--schedule", "identity", "--samples", 5)
    result = succeeds("run", *given(folder, *wanted, "--output", output))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert "5 answers written to" in result.stdout
    assert [line["index"] for line in lines] == list(range(5))
    for line, entry in zip(lines, entries, strict=False):
        assert line["images"] == [str(folder / entry["image"])]
        assert f"<image>\n{line['prompt']}" == entry["conversations"][0]["value"]
        assert line["answer"] == entry["conversations"][1]["value"]
    message = error_of("run", *given(folder, *wanted, "--compare", "--prompt", "Why?"))
    assert "--prompt, --compare is about one prompt: leave it out with --data" in message
    nowhere = given(folder, *wanted, "--output", tmp_path / "no" / "file")
    assert "is no directory; make it" in error_of("run", *nowhere)
    assert "--schedule must be given with --model" in error_of("run", *given(folder))


def test_one_prompt_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "several processes for one prompt: pass --data" in error_of("run", "--backend", "eager")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Red.", True), (" red ", True), ("red 7", False), ("", False), ("dark red", False)],
)
def test_answers_are_marked(answer: str, right: bool) -> None:
    assert is_right(answer, "red") == right


@pytest.mark.slow
def test_eval_of_the_shipped_model(tmp_path: Path) -> None:
    options = ("--samples", 48, "--backend", "eager", "--output", tmp_path)
    result = succeeds("eval", "--method", "vanilla", "--method", "hidrop", "--budget", 11, *options)
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", result.stdout, re.MULTILINE)
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("vanilla", "100", "144.0"),
        ("hidrop", "11", "16.0"),
    ]
    assert float(rows[0][2]) > 0.95
    assert 0.75 < float(rows[1][2]) < 1


def test_tasks_are_handed_over_to_lmms_eval(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        started.append(command)
        if len(started) != 3:
            (tmp_path / f"{len(started)}_results.json").write_text("{}")
        return SimpleNamespace(returncode=int(len(started) == 4))

    monkeypatch.setattr(lmms_hand_over.subprocess, "run", run)
    monkeypatch.setattr(lmms_hand_over.importlib.util, "find_spec", lambda name: object())
    given = ("--tasks", "gqa,pope", "--model", folder / "model", "--output", tmp_path)
    two = ("--schedule", "inject=1,exit=2", "--schedule", "visionzip(dominant=9,contextual=4)")
    succeeds("eval", *given, *two, "--samples", 5, "--batch-size", 4, "--max-new-tokens", 6)
    text = f"pretrained={folder / 'model'},schedule=%s,backend=inductor,dtype=auto,batch_size=4"
    for command, schedule in zip(
        started, ("inject=1;exit=2", "visionzip(dominant=9;contextual=4)"), strict=True
    ):
        assert command[1:5] == ["-m", "lmms_eval", "--model", "hidrop"]
        options = dict(zip(command[5:-1:2], command[6::2], strict=False))
        assert options["--model_args"] == text % schedule
        assert command[command.index("--tasks") + 1] == "gqa,pope"
        assert command[command.index("--limit") + 1] == "5"
        assert command[command.index("--gen_kwargs") + 1] == "max_new_tokens=6"
    nothing = error_of("eval", *given)
    assert "lmms-eval wrote no results of gqa,pope under no schedule" in nothing
    assert "lmms-eval failed behind its results of gqa,pope" in error_of("eval", *given)
    assert "--data, --budget and --tasks: tasks of lmms-eval bring their own" in error_of(
        "eval", *given, "--data", folder / "questions.json", "--budget", 11
    )


def test_tasks_need_lmms_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms_hand_over.importlib.util, "find_spec", lambda name: None)
    missing = error_of("eval", "--tasks", "gqa", "--output", tmp_path)
    assert "lmms-eval, which is not installed: pip install 'hidrop-fx[eval]'" in missing
