"""The table and the plot of compare_schedules.py's results.

    python examples/comparison_report.py

Draws `docs/experiment.png`, and writes the tables between the markers of `docs/experiment.md`; the text
around them stays.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from compare_schedules import BUDGETS, METHODS, PRESET, RESULTS, all_jobs

from hidrop_fx.demo.pictures import QUESTION_KINDS

DOCS = Path(__file__).parents[1] / "docs"
VISION_TOKENS = 144
MARKS = "<!-- tables: python examples/comparison_report.py -->", "<!-- end of tables -->"
NAMES = {
    "vanilla": "all tokens",
    "hidrop": "HiDrop",
    "hidrop-dtopk": "HiDrop, dtopk",
    "random": "HiDrop's layers, random tokens",
    "fastv": "FastV-like",
    "pdrop": "PDrop-like",
    "downsample": "average pooling",
}
LOOKS = {
    "hidrop": ("#0b6e4f", "o"),
    "hidrop-dtopk": ("#6cc24a", "D"),
    "random": ("#8a8a8a", "x"),
    "fastv": ("#d1495b", "s"),
    "pdrop": ("#edae49", "^"),
    "downsample": ("#2e6fbb", "P"),
}

Lines = Sequence[Mapping[str, Any]]
Grouped = Mapping[tuple[str, str], Lines]


def read(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Read the lines by (method, budget), one a seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for text in path.read_text().splitlines():
        line = json.loads(text)
        found[line["method"], line["budget"]].append(line)
    return dict(found)


def spread(lines: Lines, kind: str = "all") -> tuple[float, float]:
    """Return mean and standard deviation over seeds, in per cent; no deviation of one seed."""
    values = [100 * line["accuracy"][kind] for line in lines]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def kept(lines: Lines, vanilla: Lines) -> float:
    """Return the per cent of the vanilla model's accuracy, over the seeds that both have."""
    base = {line["seed"]: line["accuracy"]["all"] for line in vanilla}
    shares = [100 * line["accuracy"]["all"] / base[line["seed"]] for line in lines]
    return statistics.mean(shares)


def tokens(lines: Lines) -> float:
    return statistics.mean(line["average_tokens"] for line in lines)


def table(grouped: Grouped) -> str:
    """Tabulate the accuracy of every method at every budget, best first."""
    head = ["method", "trained", "tokens a layer", "accuracy", "of vanilla", *QUESTION_KINDS]
    rows = [head, ["---"] * len(head)]
    vanilla = grouped["vanilla", "100"]
    for budget in ("100", PRESET, *BUDGETS):
        keys = [key for key in grouped if key[1] == budget]
        for key in sorted(keys, key=lambda one: -spread(grouped[one])[0]):
            rows.append(_cells(key[0], grouped[key], vanilla))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(method: str, lines: Lines, vanilla: Lines) -> list[str]:
    mean, deviation = spread(lines)
    share = tokens(lines) / VISION_TOKENS
    accuracy = f"{mean:.1f} ± {deviation:.1f}" if len(lines) > 1 else f"{mean:.1f} (one seed)"
    if len(lines) == 2:
        accuracy += " (two seeds)"
    return [
        NAMES[method.removesuffix("-free")],
        "no" if method.endswith("-free") else "yes",
        f"{tokens(lines):.1f} ({100 * share:.1f} %)",
        accuracy,
        f"{kept(lines, vanilla):.1f} %",
        *(f"{spread(lines, kind)[0]:.1f}" for kind in QUESTION_KINDS),
    ]


def unfinished(grouped: Grouped, seeds: int) -> str:
    """List the jobs that are not in the tables."""
    done = {(*key, line["seed"]) for key, lines in grouped.items() for line in lines}
    left: dict[str, list[str]] = defaultdict(list)
    for job in all_jobs(seeds):
        if (job.method, job.budget, job.seed) not in done:
            left[f"seed {job.seed} at {job.budget} %"].append(job.method)
    if not left:
        return f"All {len(done)} jobs finished."
    listed = "; ".join(f"{where}: {', '.join(methods)}" for where, methods in left.items())
    return f"{len(done)} jobs finished. Not run: {listed}."


def setting(grouped: Grouped) -> str:
    """Describe how the lines were made, from the lines themselves."""
    line = grouped["vanilla", "100"][0]
    run, options = line["run"], line["run"]["options"]
    seconds = sum(one["train_s"] + one["evaluate_s"] for group in grouped.values() for one in group)
    return (
        f"{options['steps']} steps of {options['batch']} pictures, AdamW, rate {options['lr']:g} "
        f"(ratios {options['ratio_lr']:g}), {line['questions']} held-out questions about "
        f"{options['pictures']} pictures, backend `{options['backend']}`, fp32, {run['threads']} thread of "
        f"{run['cores']} cores of an {run['cpu']} shared with other work, {seconds / 60:.0f} minutes in all; "
        f"torch {run['torch']}, transformers {run['transformers']}."
    )


def draw(grouped: Grouped, path: Path) -> None:
    """Plot accuracy against average tokens, deviations as bars."""
    figure, axes = plt.subplots(figsize=(8.2, 4.4), layout="constrained")
    mean, deviation = spread(grouped["vanilla", "100"])
    axes.axhline(mean, color="black", linewidth=1, label="all 144 tokens")
    axes.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)
    axes.axhline(0.97 * mean, color="black", linewidth=0.8, linestyle=":", label="97 % of that")
    for method in METHODS:
        _curve(axes, grouped, method)
    axes.set_xlabel("vision tokens a layer, average over 12 layers (of 144)")
    axes.set_ylabel("held-out questions answered right, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(axes: Any, grouped: Grouped, method: str) -> None:
    groups = [
        grouped[method, budget] for budget in (PRESET, *BUDGETS) if (method, budget) in grouped
    ]
    if not groups:
        return
    base, free = method.removesuffix("-free"), method.endswith("-free")
    colour, marker = LOOKS[base]
    points = [spread(lines) for lines in groups]
    axes.errorbar(
        [tokens(lines) for lines in groups],
        [mean for mean, _ in points],
        [deviation for _, deviation in points],
        color=colour,
        marker=marker,
        markersize=5.5,
        markerfacecolor="white" if free else colour,
        linestyle="--" if free else "-",
        linewidth=1.3,
        capsize=2.5,
        label=f"{NAMES[base]}, {'training-free' if free else 'trained'}",
    )


def write(grouped: Grouped, path: Path, seeds: int) -> None:
    """Write setting, table and missing jobs between the markers."""
    text = path.read_text() if path.exists() else "\n".join(MARKS) + "\n"
    parts = [setting(grouped), table(grouped), unfinished(grouped, seeds)]
    block = "\n\n".join([MARKS[0], *parts, MARKS[1]])
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    path.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=DOCS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    grouped = read(options.results)
    draw(grouped, options.output / "experiment.png")
    write(grouped, options.output / "experiment.md", options.seeds)


if __name__ == "__main__":
    main()
