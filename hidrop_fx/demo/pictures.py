"""Pictures with known contents, and questions with known answers.

A picture is 96x96 pixels: a 3x3 grid of 32x32-pixel cells on a varied background. A cell is empty
or holds one coloured thing: a real handwritten digit, a drawn shape or a drawn three-letter word.
Everything follows from ``(seed, split)`` alone.

The digits in ``digits.npz`` (1797 images of 8x8 pixels, values 0 to 16, with their labels) are the
test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0, as distributed with
scikit-learn; they are stored here as uint8 and otherwise unchanged. Every fifth image is held out:
it appears in pictures of the split ``"test"`` and never in those of ``"train"``.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "test"]
ThingKind = Literal["digit", "shape", "word", "empty"]
QuestionKind = Literal["digit", "shape", "word", "colour", "count", "place"]

SIZE = 96
GRID = 3
CELL = SIZE // GRID
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (240, 50, 45),
    "green": (40, 200, 70),
    "blue": (70, 115, 255),
    "yellow": (250, 225, 40),
    "pink": (250, 120, 215),
    "white": (255, 255, 255),
}
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
WORDS = ("cat", "dog", "sun", "map", "key", "bus", "owl", "fox")
VALUES = (*DIGITS, *SHAPES, *WORDS, "empty")
QUESTION_KINDS: tuple[QuestionKind, ...] = (
    "digit",
    "shape",
    "word",
    "colour",
    "count",
    "place",
)
COUNTED: tuple[tuple[ThingKind, str], ...] = (
    ("digit", "digits"),
    ("shape", "shapes"),
    ("word", "words"),
)
MAX_COUNT = 5
KIND_ODDS: tuple[tuple[ThingKind, float], ...] = (
    ("digit", 0.34),
    ("shape", 0.26),
    ("word", 0.24),
    ("empty", 0.16),
)

TRAIN_VARIANTS = ((0.0, 0.0), (-10.0, 0.0), (10.0, 0.0), (0.0, -0.15), (0.0, 0.15), (6.0, 0.1))
TEST_VARIANTS = ((0.0, 0.0),)

Mask = NDArray[np.float32]


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: where it is (0-based) and what is drawn there."""

    row: int
    column: int
    kind: ThingKind
    value: str
    colour: str

    @property
    def place(self) -> str:
        """The place in words, such as ``"top left"``."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def text(self) -> str:
        """The contents in two words, such as ``"red 7"``."""
        return "empty cell" if self.kind == "empty" else f"{self.colour} {self.value}"


@dataclass(frozen=True)
class Picture:
    """A 96x96 RGB image and its nine cells in reading order."""

    image: Image.Image
    cells: tuple[Cell, ...]

    @property
    def description(self) -> str:
        """The whole grid in words, in reading order."""
        return " , ".join(cell.text for cell in self.cells)


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; ``prompt_text`` holds one ``<image>``."""

    prompt_text: str
    answer: str
    kind: QuestionKind

    @property
    def sentence(self) -> str:
        """The question alone, without the prompt around it."""
        return self.prompt_text.split("\n", 1)[1].removesuffix(" ASSISTANT:")


def prompt(question: str) -> str:
    """Return the question as a LLaVA prompt about one image."""
    return f"USER: <image>\n{question} ASSISTANT:"


DESCRIBE = "What is in the picture?"


def picture(seed: int, split: Split) -> Picture:
    """Draw the picture that belongs to ``(seed, split)``."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    cells = _contents(rng)
    canvas = _background(rng)
    for cell in cells:
        if cell.kind != "empty":
            _paint(canvas, cell, _mask(cell, split, rng), rng)
    grain = rng.normal(0.0, rng.uniform(1.0, 6.0), (SIZE, SIZE, 1)).astype(np.float32)
    pixels = np.clip(canvas + grain, 0, 255).astype(np.uint8)
    return Picture(Image.fromarray(pixels), cells)


def all_questions(picture: Picture) -> list[Question]:
    """Return every question that may be asked about the picture, in a fixed order."""
    asked: list[Question] = []
    values = [cell.value for cell in picture.cells]
    for cell in picture.cells:
        if cell.kind == "empty":
            continue
        asked.append(_about(f"Which {cell.kind} is at the {cell.place}?", cell.value, cell.kind))
        asked.append(_about(f"Which colour is at the {cell.place}?", cell.colour, "colour"))
        if values.count(cell.value) == 1:
            asked.append(_about(f"What colour is the {cell.value}?", cell.colour, "colour"))
            asked.append(_about(f"Where is the {cell.value}?", cell.place, "place"))
    for kind, plural in COUNTED:
        number = sum(cell.kind == kind for cell in picture.cells)
        asked.append(_about(f"How many {plural} are there?", str(number), "count"))
    return asked


def questions(picture: Picture, seed: int) -> list[Question]:
    """Return one question of every kind that the picture allows, drawn by ``seed``."""
    rng = np.random.default_rng([seed, 2])
    asked = all_questions(picture)
    chosen: list[Question] = []
    for kind in QUESTION_KINDS:
        candidates = [question for question in asked if question.kind == kind]
        if candidates:
            chosen.append(candidates[int(rng.integers(len(candidates)))])
    return chosen


def held_out(count: int | None = None, first: int = 0) -> Iterator[tuple[Picture, Question]]:
    """Yield the questions about held-out pictures, one of every kind a picture.

    Args:
        count: number of pictures; None goes on for ever.
        first: seed of the first picture.
    """
    seeds = itertools.count(first) if count is None else range(first, first + count)
    for seed in seeds:
        drawn = picture(seed, "test")
        for question in questions(drawn, 0):
            yield drawn, question


def varied_questions(picture: Picture, seed: int, count: int) -> list[Question]:
    """Return at most ``count`` questions: one of every kind first, then the others in order."""
    first = questions(picture, seed)
    return [*first, *(one for one in all_questions(picture) if one not in first)][:count]


def _about(question: str, answer: str, kind: QuestionKind) -> Question:
    return Question(prompt(question), answer, kind)


def _choose(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _contents(rng: np.random.Generator) -> tuple[Cell, ...]:
    """Draw nine cells, with at most ``MAX_COUNT`` things of each kind."""
    kinds = [kind for kind, _ in KIND_ODDS]
    odds = [share for _, share in KIND_ODDS]
    while True:
        drawn = rng.choice(len(kinds), size=GRID * GRID, p=odds)
        if max(int(np.sum(drawn == index)) for index in range(3)) <= MAX_COUNT:
            break
    names: dict[ThingKind, Sequence[str]] = {"digit": DIGITS, "shape": SHAPES, "word": WORDS}
    cells: list[Cell] = []
    for place, index in enumerate(drawn):
        kind = kinds[int(index)]
        value = "empty" if kind == "empty" else _choose(rng, names[kind])
        colour = "" if kind == "empty" else _choose(rng, tuple(COLOURS))
        cells.append(Cell(place // GRID, place % GRID, kind, value, colour))
    return tuple(cells)


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """Paint a muted slope between two greyish tints, [96, 96, 3], sometimes with faint stripes."""
    ends = rng.uniform(18, 62) + rng.uniform(-15, 15, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    slope = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    share = np.clip(slope + 0.5, 0, 1)[:, :, None].astype(np.float32)
    canvas = ends[0] * (1 - share) + ends[1] * share
    if rng.random() < 0.5:
        waves = np.sin(slope * rng.uniform(20, 90)) * rng.uniform(2, 9)
        canvas = canvas + waves[:, :, None]
    return canvas.astype(np.float32)


def _paint(canvas: NDArray[np.float32], cell: Cell, mask: Mask, rng: np.random.Generator) -> None:
    """Blend one thing into its cell of the canvas, within a pixel of the middle."""
    height, width = mask.shape
    shift_y, shift_x = (int(value) for value in rng.integers(-1, 2, size=2))
    top = cell.row * CELL + (CELL - height) // 2 + shift_y
    left = cell.column * CELL + (CELL - width) // 2 + shift_x
    tint = np.asarray(COLOURS[cell.colour], dtype=np.float32)
    tint = np.clip(tint + rng.uniform(-12, 12, 3).astype(np.float32), 0, 255)
    window = canvas[top : top + height, left : left + width]
    window += mask[:, :, None] * (tint - window)


def _mask(cell: Cell, split: Split, rng: np.random.Generator) -> Mask:
    """Return the share of each pixel that the thing covers, [height, width] in 0..1."""
    if cell.kind == "digit":
        masks = _digit_masks(split)[int(cell.value)]
        return masks[int(rng.integers(len(masks)))]
    if cell.kind == "shape":
        return _shape_mask(cell.value)
    return _word_mask(cell.value)


@cache
def _digit_masks(split: Split) -> tuple[tuple[Mask, ...], ...]:
    """Return the split's digit images by label, each enlarged to [16, 16].

    Training sees every image upright, turned and sheared a little; the test images stay as written.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        images, labels = stored["images"], stored["labels"]
    held_out = np.arange(len(labels)) % 5 == 4
    wanted = held_out if split == "test" else ~held_out
    variants = TEST_VARIANTS if split == "test" else TRAIN_VARIANTS
    return tuple(
        tuple(
            _enlarge(image, turn, shear)
            for image in images[wanted & (labels == label)]
            for turn, shear in variants
        )
        for label in range(10)
    )


def _enlarge(image: NDArray[np.uint8], turn: float, shear: float) -> Mask:
    """Enlarge [8, 8] in 0..16 to [16, 16] in 0..1, turned by degrees and sheared by a share of height."""
    grey = Image.fromarray((image.astype(np.float32) * (255 / 16)).astype(np.uint8))
    large = grey.resize((16, 16), Image.Resampling.BILINEAR)
    if turn:
        large = large.rotate(turn, Image.Resampling.BILINEAR)
    if shear:
        slant = (1.0, shear, -8 * shear, 0.0, 1.0, 0.0)
        large = large.transform((16, 16), Image.Transform.AFFINE, slant, Image.Resampling.BILINEAR)
    covered = np.asarray(large, dtype=np.float32) * np.float32(1.25 / 255)
    return np.clip(covered, 0, 1).astype(np.float32)


def _drawn(width: int, height: int, draw: Callable[[ImageDraw.ImageDraw], None]) -> Mask:
    """Draw at four times the size and shrink, so that edges are smooth."""
    large = Image.new("L", (width * 4, height * 4), 0)
    draw(ImageDraw.Draw(large))
    small = large.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


@cache
def _shape_mask(name: str) -> Mask:
    """Draw a shape as [16, 16] in 0..1."""
    cross = [
        *((24, 2), (39, 2), (39, 24), (61, 24), (61, 39), (39, 39)),
        *((39, 61), (24, 61), (24, 39), (2, 39), (2, 24), (24, 24)),
    ]
    strokes: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
        "circle": lambda pen: pen.ellipse((4, 4, 59, 59), fill=255),
        "square": lambda pen: pen.rectangle((6, 6, 57, 57), fill=255),
        "triangle": lambda pen: pen.polygon([(32, 2), (62, 58), (2, 58)], fill=255),
        "cross": lambda pen: pen.polygon(cross, fill=255),
        "ring": lambda pen: pen.ellipse((3, 3, 60, 60), outline=255, width=13),
    }
    return _drawn(16, 16, strokes[name])


@cache
def _word_mask(word: str) -> Mask:
    """Draw a word in the built-in bitmap font, one letter every 8 pixels, [16, 8 * letters]."""
    font = ImageFont.load_default_imagefont()
    mask = np.zeros((16, 8 * len(word)), dtype=np.float32)
    for index, letter in enumerate(word):
        glyph = Image.new("L", (6, 11), 0)
        ImageDraw.Draw(glyph).text((0, 0), letter, font=font, fill=255)
        scaled = glyph.resize((8, 15), Image.Resampling.BILINEAR)
        mask[:15, 8 * index : 8 * index + 8] = np.asarray(scaled, dtype=np.float32) / 255
    return mask
