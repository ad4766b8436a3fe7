"""Make the demo model from nothing: ``python -m hidrop_fx.demo.train --output DIR``.

Stages: the vision tower learns to name what each patch shows (``tower``); projector and decoder
learn to describe the grid and to answer from three patches of every cell (``few``), to count
(``more``) and to find things by what they are (``find``); then to do so from all patches, plainly
and under random schedules (``full``, ``last``), descriptions included (``tell``). Each stage resumes
from its file in the output directory. The model lands in ``DIR/model``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from hidrop_fx.demo.answers import (
    DEMO,
    FIRST_SHARES,
    LAST_SHARES,
    LATER_SHARES,
    Speaker,
    TrainingStage,
    train_answers,
)
from hidrop_fx.demo.build import build_model, build_processor
from hidrop_fx.demo.evaluate import measure
from hidrop_fx.demo.packed import PackedSchedule
from hidrop_fx.demo.tower import train_tower

STEPS = (1300, 900, 1200, 1200, 1000, 600, 500)
_TOWER_BATCH = 32


def stages(steps: Sequence[int]) -> tuple[TrainingStage, ...]:
    """Return the runs of the decoder's training; ``steps`` are their numbers of updates."""
    few, more, find, full, last, tell = steps
    return (
        TrainingStage("few", few, 8, 1.2e-3, 0.3, 0.7, FIRST_SHARES, True, (3,), 800_000),
        TrainingStage("more", more, 8, 1.2e-3, 0.3, 0.7, LATER_SHARES, False, (3,), 800_000),
        TrainingStage("find", find, 8, 1.2e-3, 0.4, 0.6, LAST_SHARES, False, (3,), 900_000),
        TrainingStage("full", full, 8, 8e-4, 0.4, 0.1, LAST_SHARES, False, (6, 16, 16), 2_000_000),
        TrainingStage("last", last, 8, 5e-4, 0.3, 0.05, LAST_SHARES, False, (16,), 3_000_000),
        TrainingStage("tell", tell, 8, 4e-4, 0.25, 0.05, LAST_SHARES, True, (16,), 4_000_000),
    )


def schedule_fields(schedule: PackedSchedule) -> dict[str, object]:
    """Return the schedule as the content of a schedule file."""
    return {
        "inject": schedule.inject,
        "prune": {str(layer): count for layer, count in schedule.prune.items()},
        "exit": schedule.exit,
        "score": "last_token",
        "positions": "persistent",
    }


def save(model: LlavaForConditionalGeneration, output: Path) -> None:
    """Write model, processor and schedule as they are shipped."""
    directory = output / "model"
    model.requires_grad_(True).save_pretrained(directory)
    build_processor().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    (output / "schedule.json").write_text(json.dumps(schedule_fields(DEMO)) + "\n")


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--steps",
        type=int,
        nargs=len(STEPS),
        default=STEPS,
        metavar=("TOWER", "FEW", "MORE", "FIND", "FULL", "LAST", "TELL"),
        help=f"updates of each stage (default: {' '.join(map(str, STEPS))})",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pictures", type=int, default=200, help="held-out pictures measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(seed=0)
    train_tower(model.model.vision_tower, options.output, options.steps[0], _TOWER_BATCH)
    for stage in stages(options.steps[1:]):
        train_answers(model, options.output, stage)
        save(model, options.output)
    model.eval()
    print("plain:    ", measure(model, build_processor(), options.pictures))
    print("scheduled:", Speaker(model).accuracy(DEMO, 0, options.pictures))


if __name__ == "__main__":
    main()
