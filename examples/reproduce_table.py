"""The results of `reproduce_paper.sh` as a table: each benchmark, its share of plain LLaVA's score, the average, the paper's.

python reproduce_table.py OUTPUT/results
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLAIN = "llava-v1.5-7b"
PAPER = {"hidrop-80": 98.4, "hidrop-64": 98.3, "hidrop-48": 96.5}
"""Per cent of LLaVA-1.5-7B's scores, on average over eleven benchmarks: table 1 of the paper's first version (HiDivDrop).
Those of single benchmarks are not at hand."""
BENCHMARKS: Mapping[str, tuple[str, str, float]] = {
    "GQA": ("gqa", "exact_match", 100),
    "VQAv2": ("vqav2_val", "exact_match", 100),
    "VizWiz": ("vizwiz_vqa_val", "exact_match", 100),
    "ScienceQA": ("scienceqa_img", "exact_match", 100),
    "TextVQA": ("textvqa_val", "exact_match", 100),
    "POPE": ("pope", "pope_f1_score", 100),
    "MME": ("mme", "mme_perception_score", 1),
    "MMBench": ("mmbench_en_dev", "gpt_eval_score", 1),
    "MMBench-CN": ("mmbench_cn_dev", "gpt_eval_score", 1),
    "SEED": ("seedbench", "seed_image", 100),
    "MM-Vet": ("mmvet", "gpt_eval_score", 1),
}
"""lmms-eval's task and metric, and what makes of it the number that papers print."""


def scores_in(directory: Path) -> dict[str, float]:
    """Read the benchmarks that were scored into a directory; of several results the newest counts."""
    found: dict[str, float] = {}
    for path in sorted(directory.rglob("*_results.json"), key=lambda one: one.name):
        results: dict[str, dict[str, Any]] = json.loads(path.read_text())["results"]
        for name, (task, metric, factor) in BENCHMARKS.items():
            for key, value in results.get(task, {}).items():
                if key.split(",")[0] == metric and isinstance(value, int | float):
                    found[name] = value * factor
    return found


def shares(scores: Mapping[str, float], plain: Mapping[str, float]) -> dict[str, float]:
    """Compute per cent of the plain scores, of the benchmarks that both have."""
    return {name: 100 * scores[name] / plain[name] for name in plain if name in scores}


def table(directory: Path) -> str:
    """Write the table in Markdown; an average over fewer benchmarks than eleven says over how many."""
    plain = scores_in(directory / PLAIN)
    if not plain:
        raise SystemExit(f"no results of {PLAIN} in {directory}: the table is relative to them")
    measured = {name: scores_in(directory / name) for name in PAPER}
    lines = [f"| | {PLAIN} | {' | '.join(PAPER)} |", "|---" * (2 + len(PAPER)) + "|"]
    for name in BENCHMARKS:
        cells = [_score(plain, name)]
        for scores in measured.values():
            share = shares(scores, plain).get(name)
            cells.append(_score(scores, name) + ("" if share is None else f" ({share:.1f} %)"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    averages = [_average(shares(scores, plain)) for scores in measured.values()]
    lines.append(f"| average | {_average(shares(plain, plain))} | {' | '.join(averages)} |")
    lines.append(f"| the paper's | 100 % | {' | '.join(f'{one} %' for one in PAPER.values())} |")
    return "\n".join(lines)


def _score(scores: Mapping[str, float], name: str) -> str:
    return f"{scores[name]:.1f}" if name in scores else "-"


def _average(found: Mapping[str, float]) -> str:
    if not found:
        return "-"
    of = "" if len(found) == len(BENCHMARKS) else f" of {len(found)}"
    return f"{sum(found.values()) / len(found):.1f} %{of}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    print(table(parser.parse_args().directory))
