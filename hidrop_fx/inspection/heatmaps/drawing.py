"""Draw heat maps; imported when one is asked for, since it needs pillow."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hidrop_fx.inspection.heatmaps.scores import ImageScores

_GAP, _HEAD = 14, 46
_INK, _SOFT, _PAPER, _OUTLINE = (29, 35, 48), (105, 115, 134), (255, 255, 255), (255, 255, 255)
# Dark violet to light yellow, readable in grey and for the colour-blind.
_COLOURS = np.array(
    [(13, 8, 64), (84, 18, 110), (158, 40, 100), (216, 76, 62), (247, 141, 42), (252, 222, 120)],
    dtype=np.float64,
)


def shown_pixels(pixels: Tensor, processor: Any) -> list[Image.Image]:
    """Turn `pixel_values` [n, 3, H, W] back into RGB images: the normalisation undone."""
    source = getattr(processor, "image_processor", processor)
    mean = _channels(source, "image_mean")
    std = _channels(source, "image_std")
    images = pixels.float().cpu() * std[:, None, None] + mean[:, None, None]
    arrays = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def _channels(source: Any, name: str) -> Tensor:
    values = getattr(source, name, None) or [0.5] * 3
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def drawn(
    picture: Image.Image, layers: list[ImageScores], size: int, grid: tuple[int, int]
) -> Image.Image:
    """Draw the image itself, then a panel for each filter layer.

    Args:
        picture: as the vision tower saw it.
        layers: one for each filter layer.
        size: pixels of a panel's longer side.
        grid: rows and columns of tokens.
    """
    rows, columns = grid
    total = rows * columns
    longer = max(grid)
    across, down = round(size * columns / longer), round(size * rows / longer)
    whole = picture.resize((across, down), Image.Resampling.LANCZOS)
    panels = [(whole, "image", f"{total} tokens")]
    for entry in layers:
        kept, before = int(entry.kept.sum()), int((~entry.scores.isnan()).sum())
        panels.append(
            (_panel(whole, entry, grid), f"layer {entry.layer}", f"{kept} of {before} kept")
        )
    width = _GAP + len(panels) * (across + _GAP)
    sheet = Image.new("RGB", (width, _HEAD + down + _GAP + 24), _PAPER)
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(17), ImageFont.load_default(14)
    for index, (panel, title, note) in enumerate(panels):
        x = _GAP + index * (across + _GAP)
        sheet.paste(panel, (x, _HEAD))
        draw.text((x, 16), title, _INK, bold)
        draw.text((x + across, 18), note, _SOFT, small, anchor="ra")
    _legend(sheet, draw, small, across)
    return sheet


def _panel(whole: Image.Image, entry: ImageScores, grid: tuple[int, int]) -> Image.Image:
    """Colour the greyed image by scores; tokens gone before are pale, survivors outlined."""
    size = whole.size
    scores = entry.scores.numpy().reshape(grid)
    share = _ranked(scores)
    colours = Image.fromarray(_coloured(share)).resize(size, Image.Resampling.NEAREST)
    grey = whole.convert("L").convert("RGB")
    panel = Image.blend(grey, colours, 0.7)
    gone = Image.fromarray((np.isnan(scores) * 255).astype(np.uint8))
    gone = gone.resize(size, Image.Resampling.NEAREST)
    panel.paste(Image.blend(grey, Image.new("RGB", grey.size, (232, 235, 240)), 0.82), mask=gone)
    _outline(ImageDraw.Draw(panel), entry.kept.numpy().reshape(grid), whole.width / grid[1])
    return panel


def _ranked(scores: np.ndarray) -> np.ndarray:
    """Rank scores from 0 to 1: they span orders of magnitude, and only their order decides."""
    there = ~np.isnan(scores)
    ranks = np.zeros(scores.shape)
    order = scores[there].argsort(kind="stable").argsort(kind="stable")
    ranks[there] = order / max(1, there.sum() - 1)
    return ranks


def _coloured(share: np.ndarray) -> np.ndarray:
    places = share * (len(_COLOURS) - 1)
    channels = [np.interp(places, range(len(_COLOURS)), _COLOURS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _outline(draw: ImageDraw.ImageDraw, kept: np.ndarray, cell: float) -> None:
    """Outline every region of survivors: light on a dark line, so that it shows on any colour."""
    padded = np.pad(kept, 1)
    lines = []
    for y, x in zip(*np.nonzero(kept), strict=True):
        a, b = (x * cell, y * cell), ((x + 1) * cell, (y + 1) * cell)
        sides = {
            (0, 1): (a, (b[0], a[1])),
            (2, 1): ((a[0], b[1]), b),
            (1, 0): (a, (a[0], b[1])),
            (1, 2): ((b[0], a[1]), b),
        }
        lines += [line for (dy, dx), line in sides.items() if not padded[y + dy, x + dx]]
    for colour, width in ((_INK, 4), (_OUTLINE, 2)):
        for line in lines:
            draw.line(line, fill=colour, width=width)


def _legend(sheet: Image.Image, draw: ImageDraw.ImageDraw, font: Any, size: int) -> None:
    x, y = _GAP + size + _GAP, sheet.height - 26
    bar = _coloured(np.linspace(0, 1, 120)[None].repeat(10, axis=0))
    draw.text((x, y), "score: lowest", _SOFT, font)
    start = x + int(draw.textlength("score: lowest  ", font))
    sheet.paste(Image.fromarray(bar), (start, y + 4))
    text = "  highest, by rank     outlined: kept     pale: gone before"
    if start + 130 + draw.textlength(text, font) > sheet.width:
        text = "  highest"
    draw.text((start + 122, y), text, _SOFT, font)


def stacked(pictures: list[Image.Image]) -> Image.Image:
    """Stack pictures under each other."""
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(picture.height for picture in pictures)), _PAPER)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet
