"""The comparison of methods: equal budgets, questions that the tokenizer can write, how answers are marked, its report."""

import json
import sys
from pathlib import Path

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.demo.pictures import Cell, Picture, picture
from hidrop_fx.methods import METHODS
from tests.support.paths import ROOT

sys.path.append(str(ROOT / "examples"))
import compare_schedules as comparison

pytest.importorskip("matplotlib")
import comparison_methods as methods
import comparison_report as report
import comparison_task as task

TOKENS = {"11": 16, "8": 12}
ABOVE = {"fastv": 12.92, "v2drop": 12.92, "random": 12.92, "sparsevlm": 14.5}
"""Where a single token behind one full layer costs more than 8 %."""


@pytest.mark.parametrize(("method", "budget"), [k for k in methods.SCHEDULES if k[1] in TOKENS])
def test_a_method_costs_its_budget_or_is_known_to_cost_more(method: str, budget: str) -> None:
    average = methods.costs(methods.SCHEDULES[method, budget]).average_vision_tokens
    if budget == "8" and method in ABOVE:
        assert average == pytest.approx(ABOVE[method], abs=0.01)
    elif method in ("pooling", "pooling, in place", "vtw"):
        assert average <= TOKENS[budget]
    else:
        assert TOKENS[budget] - 0.5 < average <= TOKENS[budget]


@pytest.mark.parametrize("budget", methods.KV_BUDGETS)
def test_a_cut_cache_keeps_its_budget(budget: str) -> None:
    for (method, found), text in methods.SCHEDULES.items():
        if found == budget:
            kept = methods.cached_tokens(methods.costs(text))
            limit = TOKENS[budget.removesuffix(" kv")]
            assert kept == pytest.approx(limit, abs=1), method


def test_every_method_is_there_or_named_as_missing() -> None:
    needs_training = {"twigvlm", "voco", "index-preserving", "ppe"}
    assert {name for name, _ in methods.SCHEDULES} >= set(METHODS) - needs_training
    page = (ROOT / "docs" / "experiment.md").read_text()
    assert all(f"`{name}`" in page for name in needs_training)


def _cell(place: int, kind: str, value: str, colour: str) -> Cell:
    return Cell(place // 3, place % 3, kind, value, colour)  # type: ignore[arg-type]


def test_a_sentence_tells_a_row_in_words_of_the_tokenizer() -> None:
    cells = [_cell(0, "digit", "7", "red"), _cell(1, "word", "cat", "blue")]
    cells += [_cell(place, "empty", "empty", "") for place in range(2, 9)]
    drawn = Picture(picture(0, "test").image, tuple(cells))
    found = task.sentences(drawn)
    assert found[0].prompt_text == "USER: <image>\nWhat is at the top? ASSISTANT:"
    assert found[0].answer == (
        "a red 7 is at the left , a blue cat is at the centre and nothing is at the right ."
    )
    assert found[3].answer == (
        "a red 7 is at the top , nothing is at the middle and nothing is at the bottom ."
    )
    tokenizer = task.processor().tokenizer
    for one in (one for seed in range(20) for one in task.sentences(picture(seed, "test"))):
        ids = tokenizer(one.prompt_text + one.answer).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len([word for word in one.answer.split() if word.isalnum()]) >= 10
        assert len(tokenizer(one.answer).input_ids) < task.LONGEST


def test_marks_tell_exact_answers_from_right_words() -> None:
    asked = tuple((0, one) for one in task.asked_about(picture(1, "test"), 0))
    assert [one.kind for _, one in asked] == list(task.KINDS)
    shown = task.HeldOut(torch.zeros(1), torch.zeros(1), asked)
    texts = [one.answer for _, one in asked]
    assert set(task.marks(shown, texts).values()) == {1.0}
    words = texts[-1].split()
    texts[0], texts[-1] = "nothing", " ".join(["nothing", *words[1:-1]])
    found = task.marks(shown, texts)
    assert (found["all"], found["digit"], found["sentence"]) == (0.6667, 0.0, 0.0)
    assert found["words"] == round(1 - 2 / len(words), 4)


def test_the_page_holds_what_the_results_say(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "experiment.md").read_text()
    (tmp_path / "experiment.md").write_text(page)
    found = report.grouped(comparison.RESULTS)
    parts = [report.setting(found), report.tables(found), report.unfinished(found, 3)]
    report.write("\n\n".join(parts), "tables", tmp_path / "experiment.md")
    report.write(report.calibrated(found), "calibration", tmp_path / "experiment.md")
    assert (tmp_path / "experiment.md").read_text() == page


def test_a_job_with_a_line_is_not_run_again(tmp_path: Path) -> None:
    jobs = comparison.all_jobs(2)
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"method": "hidrop", "budget": "11", "seed": 0}) + "\n")
    left = [one.name for one in comparison.missing(jobs, results, ["hidrop/*"])]
    assert left == ["hidrop/8/0", "hidrop/11/1", "hidrop/8/1"]


def test_what_was_calibrated_is_asked_for_first(tmp_path: Path) -> None:
    job = comparison.Job("calibrated", "11", 0)
    with pytest.raises(SystemExit, match="calibrated/11/0 needs the job calibrate/11/0 first"):
        comparison.schedule_of(job, tmp_path / "none.jsonl")
    assert (
        hidrop.Schedule.parse(
            comparison.schedule_of(comparison.Job("vanilla+", "100", 0), tmp_path)
        )
        == hidrop.Schedule()
    )
