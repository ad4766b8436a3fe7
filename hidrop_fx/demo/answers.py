"""Second stage: teach projector and decoder to answer, plainly and under schedules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from hidrop_fx.demo import batches, pictures
from hidrop_fx.demo.build import BOS, EOS, IMAGE, PAD, vocabulary, words
from hidrop_fx.demo.loop import Run, restore, store
from hidrop_fx.demo.packed import IDENTITY, PackedSchedule, PackedText, run_decoder
from hidrop_fx.demo.pictures import Picture
from hidrop_fx.demo.tower import tower_features

IGNORED = -100
# The schedule shipped as schedule.json: 30 of 144 vision tokens a layer on average.
DEMO = PackedSchedule(3, {5: 48, 6: 16, 7: 6}, 9)
KNOWN = vocabulary()
FIRST_SHARES: dict[str, float] = {
    "digit": 1.5,
    "shape": 1.0,
    "word": 1.0,
    "colour": 0.6,
    "count": 3.0,
    "place": 0.8,
}
LATER_SHARES: dict[str, float] = {
    "digit": 0.5,
    "shape": 0.3,
    "word": 0.3,
    "colour": 0.6,
    "count": 2.5,
    "place": 1.2,
    "part": 0.4,
}
LAST_SHARES: dict[str, float] = {
    "digit": 0.4,
    "shape": 0.2,
    "word": 0.2,
    "colour": 0.15,
    "found colour": 1.5,
    "count": 2.0,
    "place": 1.5,
    "part": 0.1,
}


@dataclass(frozen=True)
class Lesson:
    """Pictures with their questions as tensors.

    ``targets`` [B, S * T + W] holds the token that follows each answer position, else ``IGNORED``.
    """

    pixels: torch.Tensor
    text: PackedText
    targets: torch.Tensor


def ids(text: str) -> list[int]:
    """Return token ids without special tokens added."""
    return [KNOWN[word] for word in words(text)]


def lesson(
    drawn: Sequence[Picture], asked: Sequence[Sequence[tuple[str, str]]], whole: bool = False
) -> Lesson:
    """Pack (prompt, answer) pairs, equally many for each picture, and maybe the descriptions."""
    tokens, targets, last = _packed_rows([[_row(*pair) for pair in pairs] for pairs in asked])
    wholes, whole_targets = torch.zeros((len(asked), 0), dtype=torch.long), targets[:, :0, 0]
    if whole:
        rows = [[_row(*description(picture))] for picture in drawn]
        wholes, whole_targets = (block[:, 0] for block in _packed_rows(rows)[:2])
    prefix = torch.tensor([KNOWN[BOS], *ids("USER:")])
    text = PackedText(prefix, tokens, last, wholes)
    every = torch.cat([targets.flatten(1), whole_targets], dim=1)
    return Lesson(batches.pixel_values(drawn), text, every)


def description(picture: Picture) -> tuple[str, str]:
    """Return the question about the whole grid and its answer."""
    return pictures.prompt(pictures.DESCRIBE), picture.description


def _packed_rows(
    rows: Sequence[Sequence[tuple[list[int], int]]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [B, S, T], targets [B, S, T] and last prompt indices [B, S] of rows of lines."""
    length = max(len(tokens) for row in rows for tokens, _ in row)
    shape = (len(rows), len(rows[0]), length)
    tokens, targets = torch.full(shape, KNOWN[PAD]), torch.full(shape, IGNORED)
    last = torch.zeros(shape[:2], dtype=torch.long)
    for batch, row in enumerate(rows):
        for index, (line, start) in enumerate(row):
            line_ids = torch.tensor(line)
            tokens[batch, index, : len(line)] = line_ids
            targets[batch, index, start : len(line) - 1] = line_ids[start + 1 :]
            last[batch, index] = start
    return tokens, targets, last


def _row(prompt: str, answer: str) -> tuple[list[int], int]:
    """Return tokens after the image, and the index of the last prompt token among them."""
    before = ids(prompt.split(IMAGE)[1])
    return [*before, *ids(answer), KNOWN[EOS]], len(before) - 1


def part_counts(picture: Picture) -> list[tuple[str, str, str]]:
    """Return counts in one row or column, an easier step towards counting everything."""
    found: list[tuple[str, str, str]] = []
    for kind, plural in pictures.COUNTED:
        for part in (*pictures.ROWS, *pictures.COLUMNS):
            number = sum(cell.kind == kind and part in cell.place for cell in picture.cells)
            prompt = pictures.prompt(f"How many {plural} are at the {part}?")
            found.append((prompt, str(number), "part"))
    return found


def some_questions(
    picture: Picture, rng: np.random.Generator, count: int, shares: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Return ``count`` (prompt, answer) pairs, each kind drawn in proportion to its share."""
    asked = [(q.prompt_text, q.answer, str(q.kind)) for q in pictures.all_questions(picture)]
    asked += part_counts(picture)
    weights = np.array([_share(shares, prompt, kind) for prompt, _, kind in asked])
    repeat = int((weights > 0).sum()) < count
    chosen = rng.choice(len(asked), size=count, replace=repeat, p=weights / weights.sum())
    return [asked[int(index)][:2] for index in chosen]


def random_schedule(rng: np.random.Generator) -> PackedSchedule:
    """Draw a schedule near the demo's: which layers prune, how far, and where vision leaves."""
    counts = int(rng.integers(40, 80)), int(rng.integers(12, 36)), int(rng.integers(4, 16))
    layers = (4, 5, 6) if rng.random() < 0.15 else (5, 6, 7)
    prune = dict(zip(layers, counts, strict=True))
    return PackedSchedule(3, prune, int(rng.integers(8, 11)))


def some_patches(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Return ``count`` of the sixteen patches of every cell, in order, [9 * count]."""
    cells = batches.cell_patches()
    picked = np.stack([rng.permutation(row)[:count] for row in cells.numpy()])
    return torch.from_numpy(np.sort(picked.flatten()))


def patch_words(drawn: Sequence[Picture]) -> torch.Tensor:
    """Return the words that name each patch's cell as shares of one, [B, 144, vocabulary]."""
    shares = torch.zeros(len(drawn), pictures.GRID**2, len(KNOWN))
    for batch, picture in enumerate(drawn):
        for index, cell in enumerate(picture.cells):
            kind = "" if cell.kind == "empty" else cell.kind
            named = ids(f"{cell.place} {cell.text} {kind}")
            shares[batch, index, named] = 1 / len(named)
    return batches.spread(shares)


def _share(shares: Mapping[str, float], prompt: str, kind: str) -> float:
    """Return the kind's share; the colour of a named thing may have one of its own."""
    if "What colour" in prompt and "found colour" in shares:
        return shares["found colour"]
    return shares.get(kind, 0.0)


class Speaker:
    """The model in training, its tower frozen, and the losses it follows."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model
        model.model.vision_tower.requires_grad_(False)

    def vision(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projected vision tokens, [B, 144, D]."""
        with torch.no_grad():
            features = tower_features(self.model.model.vision_tower, pixels)
        projected: torch.Tensor = self.model.model.multi_modal_projector(features)
        return projected

    def naming_loss(self, vision: torch.Tensor, drawn: Sequence[Picture]) -> torch.Tensor:
        """Return the cross-entropy of projected patches against the words that name their cells."""
        normal = self.model.model.language_model.norm(vision)
        logits = self.model.lm_head(normal).flatten(0, 1)
        return nn.functional.cross_entropy(logits, patch_words(drawn).flatten(0, 1))

    def answer_loss(
        self, lesson: Lesson, vision: torch.Tensor, schedule: PackedSchedule, patches: torch.Tensor
    ) -> torch.Tensor:
        """Return cross-entropy over the answer tokens of questions, and over those of descriptions.

        The decoder sees the ``patches`` [V] of ``vision`` [B, 144, D] only.
        """
        states = run_decoder(self.model, lesson.text, vision[:, patches], schedule, patches)
        columns = lesson.text.questions[0].numel()
        parts = [(states[:, :columns], lesson.targets[:, :columns])]
        if lesson.text.whole.shape[1]:
            parts.append((states[:, columns:], lesson.targets[:, columns:]))
        return torch.stack([self._cross_entropy(*part) for part in parts])

    def _cross_entropy(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        chosen = targets != IGNORED
        return nn.functional.cross_entropy(self.model.lm_head(states[chosen]), targets[chosen])

    @torch.no_grad()
    def accuracy(self, schedule: PackedSchedule, first: int, count: int) -> dict[str, float]:
        """Return the share of held-out questions answered right, over all and by kind."""
        hits: dict[str, list[float]] = {}
        for start in range(first, first + count, 20):
            drawn = batches.draw(range(start, min(start + 20, first + count)), "test")
            asked = [pictures.questions(one, 0) for one in drawn]
            width = max(len(row) for row in asked)
            full = [[row[index % len(row)] for index in range(width)] for row in asked]
            packed = lesson(drawn, [[(q.prompt_text, q.answer) for q in row] for row in full])
            right = self._right(packed, schedule)
            for row, marks in zip(asked, right.tolist(), strict=True):
                for question, mark in zip(row, marks, strict=False):
                    hits.setdefault(question.kind, []).append(float(mark))
        every = [mark for marks in hits.values() for mark in marks]
        by_kind = {kind: round(float(np.mean(marks)), 3) for kind, marks in sorted(hits.items())}
        return {"all": round(float(np.mean(every)), 4), **by_kind}

    def _right(self, packed: Lesson, schedule: PackedSchedule) -> torch.Tensor:
        """Return whether every answer token is the likeliest, [B, S] bool; ``packed`` holds no descriptions."""
        states = run_decoder(self.model, packed.text, self.vision(packed.pixels), schedule)
        guess = self.model.lm_head(states).argmax(-1)
        right = (guess == packed.targets) | (packed.targets == IGNORED)
        return right.view(packed.text.questions.shape).all(-1)


@dataclass(frozen=True)
class TrainingStage:
    """One run of projector and decoder on ``batch`` pictures an update.

    ``plain_share`` of the updates run the plain model and ``late_share`` inject late and exit early;
    the others prune too, on all patches. ``shares`` weighs the kinds of questions, and an update
    shows one of ``cell_patches`` patches of each cell.
    """

    name: str
    steps: int
    batch: int
    peak: float
    plain_share: float
    late_share: float
    shares: Mapping[str, float]
    describe: bool
    cell_patches: tuple[int, ...]
    first_seed: int
    questions: int = 8


def train_answers(model: LlavaForConditionalGeneration, output: Path, stage: TrainingStage) -> None:
    """Train projector and decoder in place, resuming from ``output/<stage>.pt``."""
    speaker = Speaker(model)
    run = Run(model, stage.steps, stage.peak)
    checkpoint = output / f"{stage.name}.pt"
    restore(run, checkpoint)
    left = stage.steps - run.step
    first = stage.first_seed + run.step * stage.batch
    drawn_ahead = batches.drawn_ahead(first, left, stage.batch, "train")
    bar = tqdm(drawn_ahead, total=left, desc=stage.name, mininterval=5)
    losses: dict[str, list[float]] = {}
    for drawn in bar:
        found = _losses(speaker, drawn, np.random.default_rng([run.step, 7]), stage)
        run.update(torch.stack(list(found.values())).sum())
        for name, loss in found.items():
            losses.setdefault(name, []).append(loss.item())
        if run.step % 50 == 0:
            means = " ".join(f"{name} {np.mean(values):.3f}" for name, values in losses.items())
            bar.write(f"{stage.name} {run.step}: {means}")
            losses = {}
        if run.step % 200 == 0 or run.step == stage.steps:
            store(run, checkpoint)
            bar.write(f"  plain {speaker.accuracy(IDENTITY, 0, 60)}")
            bar.write(f"  demo  {speaker.accuracy(DEMO, 0, 60)}")


def _losses(
    speaker: Speaker, drawn: Sequence[Picture], rng: np.random.Generator, stage: TrainingStage
) -> dict[str, torch.Tensor]:
    """Return the losses of one update: plain, with late injection and early exit, or with pruning too."""
    draw = rng.random()
    pruned = bool(draw >= stage.plain_share + stage.late_share)
    asked = [some_questions(one, rng, stage.questions, stage.shares) for one in drawn]
    if pruned and stage.describe and rng.random() < 0.5:
        asked = [[description(one)] for one in drawn]
    packed = lesson(drawn, asked, whole=stage.describe and not pruned)
    vision = speaker.vision(packed.pixels)
    found = {"naming": 0.3 * speaker.naming_loss(vision, drawn)}
    if pruned:
        schedule, name = random_schedule(rng), "pruned"
    elif draw < stage.plain_share:
        schedule, name = IDENTITY, "plain"
    else:
        schedule, name = PackedSchedule(3, {}, 9), "late"
    seen = 16 if pruned else int(rng.choice(stage.cell_patches))
    patches = some_patches(rng, seen)
    parts = speaker.answer_loss(packed, vision, schedule, patches)
    found[name] = parts[0]
    if len(parts) > 1:
        found[f"{name} whole"] = parts[1]
    return found
