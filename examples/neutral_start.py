"""A start for the comparison that no schedule has touched, and one kind of question more.

    python examples/compare_schedules.py --make-start            # experiment/start.safetensors

Projector and decoder are made from nothing and trained with all vision tokens in all layers, by the recipe of
the shipped model (`hidrop_fx.demo.train`) without its schedules: AdamW, an extra loss that a projected patch
names its cell, eight questions a picture; first with some patches of every cell, then with all. The vision tower
is the shipped one, which was trained by itself. Beside the six kinds of questions with answers of a word
or two there are sentences: what stands in a row or a column.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from comparison_task import sentences
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from hidrop_fx.demo import MODEL_DIR, batches
from hidrop_fx.demo.answers import (
    FIRST_SHARES,
    LAST_SHARES,
    Speaker,
    lesson,
    some_patches,
    some_questions,
)
from hidrop_fx.demo.build import build_model
from hidrop_fx.demo.loop import Run, restore, store
from hidrop_fx.demo.packed import IDENTITY
from hidrop_fx.demo.pictures import Picture

FIRST_PICTURE = 7_000_000
AT_SHARES = {
    "digit": 1.5,
    "shape": 0.8,
    "word": 0.8,
    "colour": 1.0,
    "found colour": 0.0,
    "count": 1.0,
}
"""Of the kinds that are compared: what is at a place, and how many."""


@dataclass(frozen=True)
class Stage:
    """Updates of eight pictures, of which `patches` of the sixteen of each cell are shown.

    `cosine` is the number of updates after which the learning rate would be at its end.
    """

    name: str
    steps: int
    cosine: int
    patches: int
    peak: float
    shares: dict[str, float]
    first_picture: int
    sentences: float = 1 / 3
    """Share of the updates that are about sentences."""


STAGES = (
    Stage("few", 900, 900, 3, 1.2e-3, FIRST_SHARES, FIRST_PICTURE),
    Stage("find", 1000, 1000, 3, 1.2e-3, LAST_SHARES, FIRST_PICTURE + 100_000),
    Stage("full", 400, 700, 16, 8e-4, LAST_SHARES, FIRST_PICTURE + 200_000),
    Stage("last", 350, 350, 16, 8e-4, AT_SHARES, FIRST_PICTURE + 300_000),
    Stage("long", 700, 700, 16, 8e-4, AT_SHARES, FIRST_PICTURE + 400_000, sentences=0.6),
)
BATCH = 8


def make_start(path: Path) -> None:
    """Train the start and write the weights that differ from the shipped model's, the tower's left out."""
    model = build_model(seed=0)
    shipped = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    model.model.vision_tower.load_state_dict(shipped.model.vision_tower.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    speaker = Speaker(model)
    for stage in STAGES:
        _train(speaker, stage, path.with_name(f"start-{stage.name}.pt"))
    learned = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if "vision_tower" not in name and name != "lm_head.weight"
    }
    save_file(learned, path)


def _train(speaker: Speaker, stage: Stage, checkpoint: Path) -> None:
    run = Run(speaker.model, stage.cosine, stage.peak)
    restore(run, checkpoint)
    first = stage.first_picture + run.step * BATCH
    bar = tqdm(
        batches.drawn_ahead(first, stage.steps - run.step, BATCH, "train"),
        total=stage.steps - run.step,
        desc=stage.name,
        mininterval=10,
    )
    losses: dict[str, list[float]] = {}
    for drawn in bar:
        for name, loss in _update(run, speaker, stage, drawn):
            losses.setdefault(name, []).append(loss)
        if run.step % 50 == 0:
            bar.write(f"{stage.name} {run.step}: {_means(losses)}")
            losses = {}
        if run.step % 200 == 0 or run.step == stage.steps:
            store(run, checkpoint)
            bar.write(f"  held out {speaker.accuracy(IDENTITY, 0, 40)}")


def _update(
    run: Run, speaker: Speaker, stage: Stage, drawn: Sequence[Picture]
) -> Iterator[tuple[str, float]]:
    rng = np.random.default_rng([run.step, 11])
    long = rng.random() < stage.sentences
    if long:
        part = slice(0, 3) if rng.random() < 0.5 else slice(3, 6)
        asked = [
            [(one.prompt_text, one.answer) for one in sentences(shown)[part]] for shown in drawn
        ]
    else:
        asked = [some_questions(shown, rng, 8, stage.shares) for shown in drawn]
    packed = lesson(drawn, asked)
    vision = speaker.vision(packed.pixels)
    patches = some_patches(rng, stage.patches)
    answers = speaker.answer_loss(packed, vision, IDENTITY, patches)[0]
    naming = speaker.naming_loss(vision, drawn)
    run.update(answers + 0.3 * naming)
    yield "sentences" if long else "answers", answers.item()
    yield "naming", naming.item()


def _means(losses: dict[str, list[float]]) -> str:
    return " ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(losses.items()))
