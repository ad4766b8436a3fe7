"""The comparison of training under two schedules: its budget, what its arms share, its table, and a run of two steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

sys.path.append(str(ROOT / "examples"))
import compare_dual
import comparison_methods

TOKENS = 144


def test_fast_steps_use_eleven_per_cent_of_the_vision_tokens() -> None:
    found = comparison_methods.costs(compare_dual.FAST)
    assert found.average_vision_tokens == pytest.approx(0.111 * TOKENS, abs=0.1)


def test_the_table_has_means_and_spreads_over_seeds() -> None:
    options = {"steps": 5, "batch": 8, "lr": 1e-4, "temperature": 2.0, "weight": 1.0, "pictures": 3}

    def line(arm: str, full: float, fast: float, **more: Any) -> dict[str, Any]:
        given = {
            "arm": arm,
            "full": {"all": full},
            "fast": {"all": fast},
            "fast_schedule": "exit=2",
        }
        return given | {"run": {"options": options | more.pop("options", {})}} | more

    other = line("none", 0.25, 0.5, mean_step_s=1.0, options={"lr": 2e-4})
    lines = [line("start", 1.0, 0.9), line("start", 0.9, 0.8), line("none", 0.5, 0.4), other]
    assert compare_dual.table(lines).splitlines()[2:] == [
        "| `exit=2` | shipped | `start` | 5 | 0.0001 | 2 | 2 | 95.0 ± 7.1 | 85.0 ± 7.1 |  |",
        "| `exit=2` | shipped | `none` | 5 | 0.0001 | 2 | 1 | 50.0 | 40.0 |  |",
        "| `exit=2` | shipped | `none` | 5 | 0.0002 | 2 | 1 | 25.0 | 50.0 | 1.00 |",
    ]


def test_a_row_supervises_its_answer_and_end() -> None:
    (batch,) = compare_dual.training_batches(3, 1, 2)
    assert batch["pixel_values"].shape[:2] == (2, TOKENS + 1)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        answer = ids[labels != -100]
        assert answer[-1] == compare_dual.processor().tokenizer.eos_token_id
        assert torch.equal(labels[labels != -100], answer)


@pytest.mark.slow
def test_jobs_are_written_once_each(tmp_path: Path) -> None:
    results = tmp_path / "dual.jsonl"
    command = ["--results", str(results), "--seeds", "5", "--steps", "2", "--batch", "2"]
    command += ["--pictures", "1", "--jobs", "start/*", "fast_from_full/*"]
    compare_dual.main(command)
    compare_dual.main(command)
    start, taught = map(json.loads, results.read_text().splitlines())
    assert [start["arm"], taught["arm"]] == ["start", "fast_from_full"]
    assert "steps" not in start
    assert sum(taught["steps"].values()) == 2
    assert {"kl_fast", "loss_fast"} <= taught["parts"].keys()
