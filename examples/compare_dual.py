"""What training under two schedules in turn (`hidrop.DualTraining`) keeps, on the shipped model and drawn pictures.

    python examples/compare_dual.py                           # all jobs, one JSON line each
    python examples/compare_dual.py --jobs 'fast_from_full/*' # some of them: ARM/SEED
    python examples/compare_dual.py --report                  # the table
    python examples/compare_dual.py --start experiment/start.safetensors    # from a start of compare_schedules.py

Arms: "start", the shipped model as it is; "plain", fine-tuned with all vision tokens; "none", 90 % of the steps with
11 % of the vision tokens, 10 % with all; "full_from_fast" and "fast_from_full", the same steps with a teacher. All take the
same number of steps on the same pictures, and are then asked the same held-out questions with all vision
tokens and with 11 %: those of `--fast`. A job whose line is in the results file already is skipped. Seconds are of the process's CPU
time on one thread, so that other work on the machine counts little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_schedules import environment, read
from comparison_task import (
    IMAGE_TOKENS,
    FrozenTower,
    HeldOut,
    answers,
    asked_about,
    features,
    processor,
    start_model,
)
from comparison_training import rate_at
from llava_data import conversation, padded, pieces_of, tokenized
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.pictures import Picture, picture, questions

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "dual.jsonl"
FAST = "inject=3,prune=4:42+5:3+6:1,exit=9"
"""16 of 144 vision tokens, averaged over the layers."""
Asks = Callable[[Picture, int], Sequence[Any]]
"""What is asked about a picture, by its number: one question of every kind."""
ARMS = ("start", "none", "fast_from_full", "full_from_fast", "plain")
KINDS = ("full", "fast")
FIRST_TRAINING_PICTURE = 7_000_000
FIRST_TEST_PICTURE = 700_000


def asks(start: str) -> Asks:
    """Return what is asked: with a start that has learned sentences, and no places of things, what it knows."""
    return asked_about if start else questions


@cache
def held_out(seed: int, pictures: int, asked_of: Asks = questions) -> HeldOut:
    """Draw the pictures of a seed, each with one question of every kind."""
    first = FIRST_TEST_PICTURE + 10_000 * seed
    drawn = [picture(number, "test") for number in range(first, first + pictures)]
    asked = tuple((i, one) for i, shown in enumerate(drawn) for one in asked_of(shown, first + i))
    return HeldOut(torch.empty(0), features(drawn), asked)


@cache
def training_batches(
    seed: int, steps: int, size: int, asked_of: Asks = questions
) -> tuple[dict[str, Tensor], ...]:
    """Draw the batches of a seed, the same for every arm, one question of any kind a picture."""
    rng = np.random.default_rng([seed, 11])
    first = FIRST_TRAINING_PICTURE + seed * 100_000
    return tuple(
        _batch(range(start, start + size), rng, asked_of)
        for start in range(first, first + steps * size, size)
    )


def _batch(numbers: Sequence[int], rng: np.random.Generator, asked_of: Asks) -> dict[str, Tensor]:
    drawn = [picture(number, "train") for number in numbers]
    pairs = []
    for number, shown in zip(numbers, drawn, strict=True):
        asked = asked_of(shown, number)
        row = conversation([asked[int(rng.integers(len(asked)))]], "", "drawn")
        pairs.append(tokenized(pieces_of(row, processor()), processor(), IMAGE_TOKENS))
    return {
        "input_ids": padded([ids for ids, _ in pairs], processor().tokenizer.pad_token_id),
        "attention_mask": padded([torch.ones_like(ids) for ids, _ in pairs], 0),
        "labels": padded([labels for _, labels in pairs], -100),
        "pixel_values": features(drawn),
    }


def compiled_model(options: argparse.Namespace) -> Any:
    """Load the start, its tower's states in the place of pixels."""
    if options.start:
        model: Any = start_model(Path(options.start), tower=False)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
        model.model.vision_tower = FrozenTower()
    named = {"fast": options.fast, "full": hidrop.Schedule()}
    return hidrop.compile(model, named, backend=options.backend)


def training_of(arm: str, seed: int, options: argparse.Namespace) -> hidrop.DualTraining | None:
    """Return how an arm chooses and teaches; None for plain training with all tokens."""
    if arm == "plain":
        return None
    return hidrop.DualTraining(
        share=options.share,
        distill=None if arm == "none" else arm,  # type: ignore[arg-type]
        weight=options.weight,
        temperature=options.temperature,
        seed=seed,
    )


def fine_tune(model: Any, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train projector and decoder; return seconds a step by kind, and the parts of the last tenth's loss."""
    torch.manual_seed(seed)
    batches = training_batches(seed, options.steps, options.batch, asks(options.start))
    training = training_of(arm, seed, options)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=options.lr, weight_decay=0.0)
    slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, options.steps))
    seconds: dict[str, list[float]] = {"fast": [], "full": []}
    for number, batch in enumerate(batches):
        if training is not None and number == options.steps - max(1, options.steps // 10):
            training.parts()
        started = time.process_time()
        with _step(model, training, number) as kind:
            model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slower.step()
        optimizer.zero_grad()
        seconds[kind].append(time.process_time() - started)
    warm = [each for found in seconds.values() for each in found[1:]]  # the first one captures
    return {
        "steps": {kind: len(found) for kind, found in seconds.items()},
        "step_s": {k: round(statistics.median(found), 3) for k, found in seconds.items() if found},
        "mean_step_s": round(statistics.fmean(warm), 3),
        "parts": {} if training is None else {k: round(v, 4) for k, v in training.parts().items()},
    }


@contextmanager
def _step(model: Any, training: hidrop.DualTraining | None, number: int) -> Iterator[str]:
    if training is not None:
        with training.step(model, number) as kind:
            yield kind
        return
    with hidrop.use(model, "full"):
        yield "full"


def marks(shown: HeldOut, texts: Sequence[str]) -> dict[str, float]:
    """Return the share of exact answers, over all questions and by kind."""
    right = [text == one.answer for (_, one), text in zip(shown.asked, texts, strict=True)]
    found = {"all": right}
    for (_, one), hit in zip(shown.asked, right, strict=True):
        found.setdefault(one.kind, []).append(hit)
    return {name: round(sum(hits) / len(hits), 4) for name, hits in found.items()}


def run(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one arm and ask it; return the line to write."""
    started = time.process_time()
    model = compiled_model(options)
    line: dict[str, Any] = {"arm": arm, "seed": seed}
    if arm != "start":
        line |= fine_tune(model, arm, seed, options)
    shown = held_out(seed, options.pictures, asks(options.start))
    model.eval()
    for name in KINDS:
        with hidrop.use(model, name):
            line[name] = marks(shown, answers(model, shown, tower=False))
    return line | {
        "questions": len(shown.asked),
        "fast_schedule": options.fast,
        "cpu_s": round(time.process_time() - started, 1),
    }


def missing(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield arm and seed of the requested jobs that have no line yet."""
    for seed in options.seeds:
        for arm in ARMS:
            own = [one for one in read(options.results) if settings(one) == settings(options)]
            wanted = any(fnmatch(f"{arm}/{seed}", pattern) for pattern in options.jobs)
            if wanted and (arm, seed) not in {(one["arm"], one["seed"]) for one in own}:
                yield arm, seed


def settings(of: argparse.Namespace | dict[str, Any]) -> tuple[Any, ...]:
    """Return what a line, or a run to come, was trained with."""
    if isinstance(of, argparse.Namespace):
        found = vars(of)
    else:
        found = {"start": ""} | of["run"]["options"] | {"fast": of["fast_schedule"]}
    return tuple(
        found[name]
        for name in ("fast", "start", "steps", "batch", "lr", "temperature", "weight", "pictures")
    )


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return mean and standard deviation over the seeds of each arm and its settings, as Markdown."""
    rows = [
        "| fast steps | start | training | steps | rate | temperature | seeds | all tokens | fast | CPU seconds a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for given in sorted({settings(one) for one in lines}):
        for arm in ARMS:
            own = [one for one in lines if one["arm"] == arm and settings(one) == given]
            if own:
                full, fast = (_spread([100 * one[name]["all"] for one in own]) for name in KINDS)
                seconds = [one["mean_step_s"] for one in own if "mean_step_s" in one]
                shown = f"{statistics.fmean(seconds):.2f}" if seconds else ""
                schedule, start, steps, _, lr, temperature, *_ = given
                told = (
                    f"`{schedule}`",
                    start or "shipped",
                    f"`{arm}`",
                    steps,
                    f"{lr:g}",
                    f"{temperature:g}",
                )
                cells = (*told, len(own), full, fast, shown)
                rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", default=["*"], help="patterns of ARM/SEED")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fast", default=FAST, help="schedule of the fast steps")
    parser.add_argument("--start", default="", help="weights of compare_schedules.py --make-start")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--share", type=float, default=0.9, help="of the steps that are fast")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--pictures", type=int, default=40, help="held-out pictures a seed")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the table, and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    if options.report:
        print(table(read(options.results)))
        return
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for arm, seed in missing(options):
        line = run(arm, seed, options)
        names = (
            "start",
            "steps",
            "batch",
            "lr",
            "share",
            "weight",
            "temperature",
            "pictures",
            "backend",
        )
        with options.results.open("a") as results:
            results.write(json.dumps(line | {"run": environment(options, names)}) + "\n")
        print(f"{arm}/{seed}", line["full"]["all"], line["fast"]["all"], line["cpu_s"], flush=True)


if __name__ == "__main__":
    main()
