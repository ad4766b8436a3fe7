"""Methods that reduce vision tokens, compared at equal budgets on the demo task.

Over 400 lines in one file, so that it can be copied and changed.

    python examples/compare_schedules.py                         # all of it, one JSON line a job
    python examples/compare_schedules.py --jobs 'hidrop/*/0'     # some of it
    python examples/comparison_report.py                         # the table and the plot

Every job fine-tunes the shipped model for the same steps on the same pictures and questions, under
its own schedule, and then asks held-out questions through `generate`. A job whose line is in the results
file already is skipped, so that an interrupted run goes on where it stopped.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llava_data import conversation, padded, pieces_of, tokenized
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hidrop_fx as hidrop
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.batches import pixel_values
from hidrop_fx.demo.evaluate import tally
from hidrop_fx.demo.pictures import Picture, Question, picture, questions
from hidrop_fx.planning.learned_keeps import keep_counts

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "experiment.jsonl"
SIDE = 12
FIRST_TRAINING_PICTURE = 6_000_000
FIRST_TEST_PICTURE = 300_000

# Vision tokens a layer on average, of 144: 20, 16 and 12.
BUDGETS = ("14", "11", "8")
# `Schedule.preset("hidrop-64", 12)`: layers scaled, keeps as for 576 tokens; 25 a layer. For HiDrop alone.
PRESET = "18"
# The paper's layers scaled from 32 to 12; the first prune is what makes up the budget.
HIDROP = {
    PRESET: str(hidrop.Schedule.preset("hidrop-64", 12)),
    "14": "inject=3,prune=4:90+5:3+6:1,exit=9",
    "11": "inject=3,prune=4:42+5:3+6:1,exit=9",
    "8": "inject=3,prune=3:100+4:38+5:3+6:1,exit=9",
}
# K = 2 of 32 layers is 0.75 of 12. One full layer costs 12 tokens of the average already.
FASTV = {"14": "prune=1:9", "11": "prune=1:4", "8": "prune=1:1"}
# Four equal stages, each half of the one before; a full first stage alone would cost 36 a layer.
PDROP = {
    "14": "prune=0:43+3:21+6:11+9:5,positions=compact",
    "11": "prune=0:34+3:17+6:9+9:4,positions=compact",
    "8": "prune=0:26+3:13+6:6+9:3,positions=compact",
}
GRIDS = {"14": (4, 5), "11": (4, 4), "8": (3, 4)}


@dataclass(frozen=True)
class Variant:
    """A model as one method changes it: under a schedule, or with fewer image tokens."""

    schedule: str | None = None
    grid: tuple[int, int] = (SIDE, SIDE)

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


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
        return not self.method.endswith("-free")

    @property
    def variant(self) -> Variant:
        match self.method.removesuffix("-free"):
            case "vanilla":
                return Variant()
            case "hidrop":
                return Variant(HIDROP[self.budget])
            case "hidrop-dtopk":
                return Variant(HIDROP[self.budget] + ",selection=dtopk")
            case "random":
                return Variant(HIDROP[self.budget] + ",score=random")
            case "fastv":
                return Variant(FASTV[self.budget])
            case "pdrop":
                return Variant(PDROP[self.budget])
            case "downsample":
                return Variant(grid=GRIDS[self.budget])
            case other:
                raise ValueError(f"no method {other!r}")


METHODS = (
    "hidrop",
    "hidrop-dtopk",
    "downsample",
    "pdrop",
    "fastv",
    "random",
    "hidrop-free",
    "pdrop-free",
    "fastv-free",
)


def all_jobs(seeds: int) -> list[Job]:
    """Return the jobs in order of importance: everything once before anything twice."""
    jobs = []
    for seed in range(seeds):
        jobs.append(Job("vanilla", "100", seed))
        jobs += [Job(method, budget, seed) for budget in ("11", "8", "14") for method in METHODS]
        jobs += [Job(method, PRESET, seed) for method in ("hidrop", "hidrop-free")]
    return jobs


# The task: features of pictures, computed once, since the vision tower is frozen.


class FrozenTower(nn.Module):
    """A tower that takes its own states [n, 145, D] in the place of pixels and returns them."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, hidden_states=(pixel_values,)
        )


class Pool(nn.Module):
    """A projector whose patches [n, 144, D] are averaged over a coarser grid."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        square = tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        return nn.functional.adaptive_avg_pool2d(square, self.grid).flatten(2).transpose(1, 2)


@cache
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL_DIR)


@cache
def shipped() -> dict[str, Tensor]:
    """Return the weights that every job starts from, the tower's left out."""
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    model.model.vision_tower = FrozenTower()
    return {name: value.clone() for name, value in model.state_dict().items()}


@cache
def tower() -> nn.Module:
    return LlavaForConditionalGeneration.from_pretrained(MODEL_DIR).model.vision_tower.eval()


@torch.no_grad()
def features(drawn: Sequence[Picture]) -> Tensor:
    """Run the tower: [n, 145, D]."""
    pixels = pixel_values(drawn).split(20)
    return torch.cat([tower()(part).last_hidden_state for part in pixels])


@dataclass(frozen=True)
class Batch:
    """Pictures' features and the conversations about them."""

    features: Tensor
    rows: tuple[dict[str, Any], ...]

    def inputs(self, image_tokens: int) -> dict[str, Tensor]:
        """Return the model's inputs, padded on the right."""
        pairs = [
            tokenized(pieces_of(row, processor()), processor(), image_tokens) for row in self.rows
        ]
        ids = [row for row, _ in pairs]
        return {
            "input_ids": padded(ids, processor().tokenizer.pad_token_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "labels": padded([labels for _, labels in pairs], -100),
            "pixel_values": self.features,
        }


@cache
def training_batches(seed: int, steps: int, size: int) -> tuple[Batch, ...]:
    """Draw the batches, the same for every method: pictures, three in four with one question, the others with two rounds."""
    rng = np.random.default_rng([seed, 9])
    first = FIRST_TRAINING_PICTURE + seed * 100_000
    batches = []
    for start in tqdm(range(first, first + steps * size, size), desc="pictures", leave=False):
        drawn = [picture(number, "train") for number in range(start, start + size)]
        rows = tuple(_row(one, rng) for one in drawn)
        batches.append(Batch(features(drawn), rows))
    return tuple(batches)


def _row(drawn: Picture, rng: np.random.Generator) -> dict[str, Any]:
    asked = questions(drawn, int(rng.integers(1 << 30)))
    chosen = rng.permutation(len(asked))[: 1 + int(rng.integers(4) == 0)]
    return conversation([asked[index] for index in chosen], "", "drawn")


@cache
def held_out(pictures: int) -> tuple[Tensor, tuple[tuple[int, Question], ...]]:
    """Return the features of test pictures, and one question of every kind about each."""
    drawn = [picture(FIRST_TEST_PICTURE + index, "test") for index in range(pictures)]
    asked = [(index, one) for index, shown in enumerate(drawn) for one in questions(shown, 0)]
    return features(drawn), tuple(asked)


# One job.


@cache
def model_of(variant: Variant, backend: str) -> Any:
    """Build one model object a variant, so that a schedule is captured once for all seeds."""
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    model.model.vision_tower = FrozenTower()
    if variant.schedule is not None:
        hidrop.compile(model, variant.schedule, backend=backend)
    elif variant.image_tokens < SIDE * SIDE:
        projector = model.model.multi_modal_projector
        projector.register_forward_hook(lambda *given: Pool(variant.grid)(given[2]))
    return model


def reset(model: Any, weights: Mapping[str, Tensor]) -> None:
    model.load_state_dict(weights)
    ratios = getattr(model, "hidrop_ratios", None)
    if ratios is not None:
        fresh = type(ratios)(hidrop.inspect(model).plan)
        ratios.values.data.copy_(fresh.values.data)


def train(model: Any, job: Job, options: argparse.Namespace) -> float:
    """Fine-tune projector and decoder; return the mean loss of the last tenth of the steps."""
    torch.manual_seed(job.seed)
    model.train()
    ratios = list(model.hidrop_ratios.parameters()) if hasattr(model, "hidrop_ratios") else []
    others = [one for one in model.parameters() if all(one is not ratio for ratio in ratios)]
    groups = [{"params": others, "lr": options.lr}, {"params": ratios, "lr": options.ratio_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))
    losses = []
    batches = training_batches(job.seed, options.steps, options.batch)
    for batch in tqdm(batches, desc=job.name, leave=False, mininterval=5):
        loss = model(**batch.inputs(job.variant.image_tokens)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 10)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def accuracy(model: Any, job: Job, pictures: int, size: int = 48) -> dict[str, float]:
    """Measure exact match of greedy answers over all questions and by kind."""
    torch.manual_seed(job.seed)
    model.eval()
    seen, asked = held_out(pictures)
    marks = []
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        inputs = _prompts([one for _, one in part], job.variant.image_tokens)
        images = seen[[index for index, _ in part]]
        produced = model.generate(**inputs, pixel_values=images, do_sample=False, max_new_tokens=4)
        fresh = produced[:, inputs["input_ids"].shape[1] :]
        texts = processor().batch_decode(fresh, skip_special_tokens=True)
        marks += [
            (one.kind, text.strip() == one.answer)
            for (_, one), text in zip(part, texts, strict=True)
        ]
    return tally(marks)


def _prompts(asked: Sequence[Question], image_tokens: int) -> dict[str, Tensor]:
    rows = [tokenized([(one.prompt_text, False)], processor(), image_tokens)[0] for one in asked]
    ids = padded([row.flip(0) for row in rows], processor().tokenizer.pad_token_id).flip(1)
    mask = padded([torch.ones_like(row) for row in rows], 0).flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def tokens_a_layer(model: Any, variant: Variant) -> tuple[float, dict[int, int]]:
    """Return the vision tokens a layer on average as they run, and the counts that dtopk learned."""
    if variant.schedule is None:
        return float(variant.image_tokens), {}
    schedule = hidrop.Schedule.parse(variant.schedule)
    counts: dict[int, int] = {}
    if schedule.selection == "dtopk":
        counts = keep_counts(SIDE * SIDE, model.hidrop_ratios.numbers())
        schedule = replace(schedule, prune=counts, selection="hard")
    return hidrop.plan(schedule, model, vision_tokens=SIDE * SIDE).average_vision_tokens, counts


def run(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure; return the line to write."""
    started = time.perf_counter()
    model = model_of(job.variant, options.backend)
    line: dict[str, Any] = {"method": job.method, "budget": job.budget, "seed": job.seed}
    line["schedule"] = job.variant.schedule
    plain = options.work / f"vanilla-{job.seed}.pt"
    if job.trained:
        reset(model, shipped())
        line["loss"] = round(train(model, job, options), 4)
    else:
        reset(model, torch.load(plain, weights_only=True))
    if job.method == "vanilla":
        plain.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), plain)
    trained = time.perf_counter()
    line["accuracy"] = accuracy(model, job, options.pictures)
    average, counts = tokens_a_layer(model, job.variant)
    line |= {"average_tokens": round(average, 3), "image_tokens": job.variant.image_tokens}
    line |= {"learned_counts": counts} if counts else {}
    line["questions"] = len(held_out(options.pictures)[1])
    line["train_s"] = round(trained - started, 1)
    line["evaluate_s"] = round(time.perf_counter() - trained, 1)
    return line


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return the versions and hardware that a line was made with."""
    names = ("steps", "batch", "lr", "ratio_lr", "pictures", "backend")
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


def missing(jobs: Sequence[Job], path: Path, patterns: Sequence[str]) -> Iterator[Job]:
    """Return the requested jobs that have no line yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = {(one["method"], one["budget"], one["seed"]) for one in map(json.loads, lines)}
    for job in jobs:
        wanted = any(fnmatch(job.name, pattern) for pattern in patterns)
        if wanted and (job.method, job.budget, job.seed) not in found:
            yield job


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", default=["*"], help="patterns of METHOD/BUDGET/SEED")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ratio-lr", type=float, default=2e-3, help="of dtopk's learned ratios")
    parser.add_argument("--pictures", type=int, default=80, help="held-out pictures")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("experiment"), help="vanilla weights")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for job in missing(all_jobs(options.seeds), options.results, options.jobs):
        line = run(job, options)
        with options.results.open("a") as results:
            results.write(json.dumps(line | {"run": environment(options)}) + "\n")
        print(job.name, line["average_tokens"], line["accuracy"], line["train_s"], flush=True)


if __name__ == "__main__":
    main()
