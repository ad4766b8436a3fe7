"""The tables and the plot of compare_schedules.py's results.

    python examples/comparison_report.py

Draws `docs/experiment.png`, and writes the tables between the markers of `docs/experiment.md`; the text
around them stays.
"""

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from compare_schedules import ALL, CALIBRATE, PLAIN, PYRAMID, RESULTS, all_jobs, read
from comparison_methods import BUDGETS, KV_BUDGETS, OWN
from comparison_task import KINDS

DOCS = Path(__file__).parents[1] / "docs"
TITLES = {
    "11": "11 % of the vision tokens: 16 of 144 a layer",
    "8": "8 % of the vision tokens: 12 of 144 a layer",
    "11 kv": "11 % of the vision tokens in the KV cache, after a prefill with more",
    "8 kv": "8 % of the vision tokens in the KV cache, after a prefill with more",
    OWN: "As published, at a cost of their own",
}
BEST = 8
NAMES = {PLAIN: "all tokens"}
COLOURS = {
    "calibrated": "#0b6e4f",
    PYRAMID: "#6cc24a",
    "hidrop": "#e07a1f",
    "pooling": "#2e6fbb",
    "pooling, in place": "#2e6fbb",
    "divprune, in place": "#7b4fa3",
    "cdpruner, in place": "#b07cc6",
    "divprune": "#7b4fa3",
    "cdpruner": "#b07cc6",
    "visionzip": "#19a7b0",
    "duet": "#136f75",
    "pyramiddrop": "#c9a227",
    "fastv": "#d1495b",
    "v2drop": "#f092a0",
    "sparsevlm": "#8c564b",
    "hidrop, random": "#8a8a8a",
    "random": "#555555",
    "vtw": "#000000",
}

Lines = Sequence[Mapping[str, Any]]
Grouped = Mapping[tuple[str, str], Lines]


def grouped(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Read the lines by (method, budget), one a seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in read(path):
        found[line["method"], line["budget"]].append(line)
    return dict(found)


def spread(lines: Lines, kind: str = "all") -> tuple[float, float]:
    """Return mean and standard deviation over seeds, in per cent; no deviation of one seed."""
    values = [100 * line["accuracy"][kind] for line in lines]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def kept(lines: Lines, vanilla: Lines) -> float:
    """Return the per cent of the vanilla model's accuracy, over the seeds that both have."""
    base = {line["seed"]: line["accuracy"]["all"] for line in vanilla}
    return statistics.mean(100 * line["accuracy"]["all"] / base[line["seed"]] for line in lines)


def tables(found: Grouped) -> str:
    """Tabulate every method by budget, best first; fine-tuned ones in a table of their own."""
    parts = []
    for budget in (*BUDGETS, *KV_BUDGETS, OWN):
        keys = [key for key in found if key[1] == budget and _measured(key[0], trained=False)]
        if keys:
            parts.append(_table(TITLES[budget], keys, (PLAIN, ALL), found))
    trained = [key for key in found if _measured(key[0], trained=True) and key[0] != f"{PLAIN}+"]
    if trained:
        parts.append(_table("Fine-tuned, at 11 %", trained, (f"{PLAIN}+", ALL), found))
    return "\n\n".join(parts)


def _measured(method: str, *, trained: bool) -> bool:
    return method != CALIBRATE and method.endswith("+") == trained


def _table(
    title: str, keys: Sequence[tuple[str, str]], base: tuple[str, str], found: Grouped
) -> str:
    head = ["method", "schedule", "tokens a layer", "in the cache", "FLOPs"]
    head += ["accuracy", "of all tokens", *KINDS, "words of sentences"]
    rows = [head, ["---"] * len(head)]
    for key in (base, *sorted(keys, key=lambda one: -spread(found[one])[0])):
        rows.append(_cells(key[0], found[key], found[base]))
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"**{title}**\n\n{body}"


def _cells(method: str, lines: Lines, vanilla: Lines) -> list[str]:
    first = lines[0]
    mean, deviation = spread(lines)
    accuracy = f"{mean:.1f} ± {deviation:.1f}" if len(lines) > 1 else f"{mean:.1f} (one seed)"
    if len(lines) == 2:
        accuracy += " (two seeds)"
    return [
        NAMES.get(method.removesuffix("+"), method.removesuffix("+")),
        f"`{first['schedule']}`",
        f"{first['average_tokens']:.1f}",
        f"{first['cached_tokens']:.1f}",
        f"{100 * first['flops_share']:.0f} %",
        accuracy,
        f"{kept(lines, vanilla):.1f} %",
        *(f"{spread(lines, kind)[0]:.0f}" for kind in (*KINDS, "words")),
    ]


def calibrated(found: Grouped) -> str:
    """Tabulate what each calibration found, in its own order: the first `BEST`, and every plain method."""
    parts = []
    for budget in BUDGETS:
        for line in found.get((CALIBRATE, budget), ()):
            head = ["method", "schedule", "tokens a layer", "KL", "accuracy", "accuracy held out"]
            rows = [head, ["---"] * len(head)]
            for place, one in enumerate(line["candidates"]):
                if place >= BEST and one["name"].startswith(("before=", "prune=", "exit=")):
                    continue
                search, other = one["search"], one["held_out"]
                rows.append(
                    [
                        f"`{one['name']}`",
                        f"`{one['schedule']}`",
                        f"{one['average_tokens']:.1f}",
                        f"{search['kl']:.3f}",
                        f"{100 * search['accuracy']:.1f}",
                        f"{100 * other['accuracy']:.1f}",
                    ]
                )
            body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            title = f"**What calibration found at {budget} %** ({line['reasons'][0]})"
            parts.append(f"{title}\n\n{body}")
    return "\n\n".join(parts)


def unfinished(found: Grouped, seeds: int) -> str:
    """List the jobs that are not in the tables."""
    done = {(*key, line["seed"]) for key, lines in found.items() for line in lines}
    left: dict[str, list[str]] = defaultdict(list)
    for job in all_jobs(seeds):
        if (job.method, job.budget, job.seed) not in done:
            left[f"seed {job.seed} at {job.budget} %"].append(job.method)
    if not left:
        return f"All {len(done)} jobs finished."
    listed = "; ".join(f"{where}: {', '.join(methods)}" for where, methods in left.items())
    return f'{len(done)} jobs finished. Not run (a method with "+" is fine-tuned): {listed}.'


def setting(found: Grouped) -> str:
    """Describe how the lines were made, from the lines themselves."""
    lines = found[PLAIN, ALL]
    run, options = lines[0]["run"], lines[0]["run"]["options"]
    asked = sum(line["questions"] for line in lines)
    seconds = sum(one["cpu_s"] for group in found.values() for one in group)
    return (
        f"{asked} held-out questions about {len(lines)} x {options['pictures']} pictures, backend "
        f"`{options['backend']}`, fp32, {run['threads']} thread of {run['cores']} cores of an {run['cpu']} shared "
        f"with other work, {seconds / 60:.0f} minutes of CPU time in all, the start left out; torch "
        f"{run['torch']}, transformers {run['transformers']}."
    )


def draw(found: Grouped, path: Path) -> None:
    """Plot, for each method at each budget, exact answers of a word or two and right words of sentences."""
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.8), layout="constrained", sharey=True)
    shown = [one for one in COLOURS if any((one, budget) in found for budget in BUDGETS)]
    shown.sort(key=lambda one: spread(found.get((one, "11"), found.get((one, "8"), ())))[0])
    for axis, budget in zip(axes, BUDGETS, strict=True):
        mean, deviation = spread(found[PLAIN, ALL])
        axis.axvline(mean, color="black", linewidth=1)
        axis.axvspan(mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)
        axis.axvline(0.98 * mean, color="black", linewidth=0.8, linestyle=":")
        for row, method in enumerate(shown):
            if (method, budget) in found:
                _bar(axis, row, found[method, budget], COLOURS[method])
        axis.set_yticks(range(len(shown)), shown)
        axis.set_title(TITLES[budget], fontsize=10)
        axis.set_xlabel("held-out questions answered exactly, %")
        axis.set_xlim(0, 100)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].plot([], [], color="black", linewidth=1, label="all 144 tokens")
    axes[0].plot([], [], color="black", linewidth=0.8, linestyle=":", label="98 % of that")
    axes[0].plot([], [], "|", color="black", markersize=9, label="sentences alone")
    figure.legend(
        handles=axes[0].get_legend_handles_labels()[0],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bar(axis: Any, row: int, lines: Lines, colour: str) -> None:
    mean, deviation = spread(lines)
    axis.barh(row, mean, color=colour, alpha=0.75, height=0.65, xerr=deviation, ecolor="#444444")
    axis.plot(spread(lines, "sentence")[0], row, "|", color="black", markersize=10, mew=2)


def write(text: str, name: str, path: Path) -> None:
    """Put a text between the markers of a name."""
    page = path.read_text()
    marks = f"<!-- {name}: python examples/comparison_report.py -->", f"<!-- end of {name} -->"
    pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
    if not re.search(pattern, page, flags=re.DOTALL):
        raise SystemExit(f"{path} has no lines {marks[0]!r} and {marks[1]!r}")
    block = f"{marks[0]}\n\n{text}\n\n{marks[1]}"
    path.write_text(re.sub(pattern, lambda _: block, page, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=DOCS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    found = grouped(options.results)
    page = options.output / "experiment.md"
    draw(found, options.output / "experiment.png")
    parts = [setting(found), tables(found), unfinished(found, options.seeds)]
    write("\n\n".join(parts), "tables", page)
    write(calibrated(found), "calibration", page)


if __name__ == "__main__":
    main()
