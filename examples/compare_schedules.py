"""Methods that reduce vision tokens, compared at equal budgets on the demo task, from a neutral start.

    python examples/compare_schedules.py --make-start            # train the start: half an hour on one core
    python examples/compare_schedules.py                         # all jobs, one JSON line each
    python examples/compare_schedules.py --jobs 'hidrop/*/0'     # some of them
    python examples/comparison_report.py                         # the tables and the plot

The start was trained with all vision tokens (`neutral_start.py`). A job runs it under the schedule of one method
and asks held-out questions through `generate`, the same ones for every method of a seed. "calibrate" jobs let
`hidrop.calibrate` choose among methods and their compositions on other pictures; "calibrated" ones measure what it
chose. Methods that end in "+" are fine-tuned first, the same steps on the same pictures, each under its own schedule. A
job whose line is in the results file already is skipped, so that an interrupted run goes on where it stopped.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from comparison_methods import (
    BUDGETS,
    CANDIDATES,
    KV_BUDGETS,
    OWN,
    SCHEDULES,
    cached_tokens,
    costs,
)
from comparison_task import answers, calibration_records, held_out, marks, processor, start_model
from comparison_training import fine_tune
from neutral_start import make_start

import hidrop_fx as hidrop
from hidrop_fx.analysis.data.records import batches_of

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "experiment.jsonl"
PLAIN = "vanilla"
ALL = "100"
CALIBRATE = "calibrate"
CHOSEN = "calibrated"
PYRAMID = "hidrop, calibrated"
REFINED = "calibrated, refined"
TRAINED = (PLAIN, "hidrop", "pooling", CHOSEN)
MERGED = 8
"""Of the best candidates, so many are tried once more with what they drop merged into what they keep."""
CALIBRATION_TOKENS = {"11": 16, "8": 12}


@dataclass(frozen=True)
class Job:
    """One line of the results."""

    method: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}/{self.budget}/{self.seed}"

    @property
    def trained(self) -> bool:
        return self.method.endswith("+")


def all_jobs(seeds: int) -> list[Job]:
    """Return the jobs in order of importance: everything once before anything twice, training last."""
    jobs = [Job(CALIBRATE, budget, 0) for budget in BUDGETS]
    for seed in range(seeds):
        jobs.append(Job(PLAIN, ALL, seed))
        for budget in (*BUDGETS, *KV_BUDGETS, OWN):
            if budget in BUDGETS:
                jobs += [Job(method, budget, seed) for method in (CHOSEN, REFINED, PYRAMID)]
            jobs += [Job(method, budget, seed) for method, one in SCHEDULES if one == budget]
    for seed in range(seeds):
        jobs += [Job(f"{name}+", ALL if name == PLAIN else "11", seed) for name in TRAINED]
    return jobs


def schedule_of(job: Job, results: Path) -> str:
    """Return a job's schedule as text; what was calibrated is read from the results."""
    method = job.method.removesuffix("+")
    if method == PLAIN:
        return "identity"
    if method not in (CHOSEN, PYRAMID, REFINED):
        return SCHEDULES[method, job.budget]
    lines = [
        one for one in read(results) if (one["method"], one["budget"]) == (CALIBRATE, job.budget)
    ]
    if not lines:
        raise SystemExit(f"{job.name} needs the job {CALIBRATE}/{job.budget}/0 first")
    if method == REFINED:
        return lines[0]["refined"]
    found = lines[0]["candidates"]
    if method == PYRAMID:
        return next(one["schedule"] for one in found if one["name"] == "hidrop")
    return found[0]["schedule"]


# One job.


@cache
def shared_model(start: Path, backend: str, tower: bool) -> Any:
    """Load the start once, captured once for all schedules."""
    return hidrop.compile(start_model(start, tower=tower), "identity", backend=backend)


@cache
def plain_model(start: Path) -> Any:
    return start_model(start, tower=False)


def run(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a method; return the line to write."""
    started = time.process_time()
    line = calibrate(job.budget, options) if job.method == CALIBRATE else measure(job, options)
    line["cpu_s"] = round(time.process_time() - started, 1)
    return {"method": job.method, "budget": job.budget, "seed": job.seed, **line}


def measure(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Ask the held-out questions of the job's seed under its schedule."""
    text = schedule_of(job, options.results)
    schedule = hidrop.Schedule.parse(text)
    planned = costs(schedule)
    line: dict[str, Any] = {
        "schedule": str(schedule),
        "average_tokens": round(planned.average_vision_tokens, 2),
        "cached_tokens": round(cached_tokens(planned), 2),
        "flops_share": round(planned.flops / planned.identity.flops, 3),
    }
    tower = schedule.reduction is not None and schedule.reduction.reducer.reads_pixels
    if job.trained:
        model = start_model(options.start, tower=False)
        if schedule != hidrop.Schedule():
            hidrop.compile(model, schedule, backend=options.backend)
        line["loss"] = round(fine_tune(model, job.seed, options), 4)
        under = nullcontext()
    elif job.method == PLAIN:
        model, under = plain_model(options.start), nullcontext()
    else:
        model = shared_model(options.start, options.backend, tower)
        under = hidrop.use(model, schedule)
    torch.manual_seed(job.seed)
    shown = held_out(job.seed, options.pictures)
    with under:
        texts = answers(model.eval(), shown, tower=tower)
    line["accuracy"] = marks(shown, texts)
    line["questions"] = len(shown.asked)
    return line


@cache
def calibration(start: Path, samples: int) -> hidrop.Calibration:
    model = start_model(start)
    records = calibration_records(samples)
    batches = list(batches_of(model, processor(), records, batch_size=16, answers=True))
    return hidrop.calibrate(model, batches, progress=False)


def calibrate(budget: str, options: argparse.Namespace) -> dict[str, Any]:
    """Choose a schedule on pictures that no result is about: among methods, then of the best with what they drop merged."""
    found = calibration(options.start, options.samples)
    tokens = CALIBRATION_TOKENS[budget]
    best = found.schedule(average_vision_tokens=tokens, methods=CANDIDATES, trials=options.trials)
    first = found.decisions[-1]
    pruning = [one.schedule for one in first.candidates if one.schedule.prune]
    unmerged = [one for one in pruning if one.merge is None][:MERGED]
    merged = [replace(one, merge="nearest_key") for one in unmerged]
    best = found.schedule(average_vision_tokens=tokens, methods=[best, *merged])
    second = found.decisions[-1]
    refined = found.refine(best, options.evaluations)
    tried = {one.schedule: one for one in (*second.candidates, *first.candidates)}
    ranked = sorted(tried.values(), key=_loss)
    return {
        "schedule": str(best),
        "refined": str(refined),
        "samples": options.samples,
        "reasons": [*first.reasons, *second.reasons],
        "candidates": [_candidate(one) for one in ranked],
    }


def _loss(candidate: Any) -> float:
    return candidate.search.kl


def _candidate(one: Any) -> dict[str, Any]:
    """Return a candidate as a part of a line, with its scores on the samples chosen on and held out."""
    scores = {"search": one.search, "held_out": one.held_out}
    return {
        "name": one.name,
        "schedule": str(one.schedule),
        "average_tokens": round(one.cost, 2),
        **{
            part: {"samples": score.samples, "kl": score.kl, "accuracy": score.accuracy}
            for part, score in scores.items()
        },
    }


# Results.


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def missing(jobs: Sequence[Job], path: Path, patterns: Sequence[str]) -> Iterator[Job]:
    """Return the requested jobs that have no line yet."""
    found = {(one["method"], one["budget"], one["seed"]) for one in read(path)}
    for job in jobs:
        wanted = any(fnmatch(job.name, pattern) for pattern in patterns)
        if wanted and (job.method, job.budget, job.seed) not in found:
            yield job


NOTED = ("pictures", "samples", "trials", "evaluations", "steps", "batch", "lr", "backend")
"""Options that a line tells."""


def environment(options: argparse.Namespace, names: Sequence[str] = NOTED) -> dict[str, Any]:
    """Return the options of these names, and the versions and hardware that a line was made with."""
    return {
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "options": {name: getattr(options, name) for name in names},
        "hidrop_fx": hidrop.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make-start", action="store_true", help="train the start, and stop")
    parser.add_argument("--start", type=Path, default=Path("experiment/start.safetensors"))
    parser.add_argument("--jobs", nargs="+", default=["*"], help="patterns of METHOD/BUDGET/SEED")
    parser.add_argument("--seeds", type=int, default=3, help="of held-out pictures")
    parser.add_argument("--pictures", type=int, default=40, help="held-out pictures a seed")
    parser.add_argument("--samples", type=int, default=72, help="questions that calibrate")
    parser.add_argument("--trials", type=int, default=12, help="pyramids that calibration compares")
    parser.add_argument("--evaluations", type=int, default=12, help="of refining what was chosen")
    parser.add_argument("--steps", type=int, default=60, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.make_start:
        make_start(options.start)
        return
    if not options.start.exists():
        raise SystemExit(f"{options.start} is not there; make it with --make-start")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for job in missing(all_jobs(options.seeds), options.results, options.jobs):
        line = run(job, options)
        with options.results.open("a") as results:
            results.write(json.dumps(line | {"run": environment(options)}) + "\n")
        print(job.name, line["schedule"], line.get("accuracy"), line["cpu_s"], flush=True)


if __name__ == "__main__":
    main()
