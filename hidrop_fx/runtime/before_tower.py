"""The stage before the vision tower: a prompt without the cells that a classifier takes for background.

    prompt, family = foreground(scheduled, prompt, inputs, copies)
    encoded = encode(family, base, inputs)

The tower runs on the other cells alone. Which those are is known on the host before any program runs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.models import Family
from hidrop_fx.models.encoding import once
from hidrop_fx.models.kept_cells import GRID, PIXELS, cell_shape, grids, keeping
from hidrop_fx.ops.foreground import first_frames
from hidrop_fx.planning.batch_layout import count_images
from hidrop_fx.runtime.classifier import classified
from hidrop_fx.runtime.given_modules import given_modules
from hidrop_fx.runtime.prompt import Prompt
from hidrop_fx.runtime.reduction import needs_pixels, shortened
from hidrop_fx.runtime.scheduled_model import ScheduledModel

_EVERY_CELL: ContextVar[bool] = ContextVar("every cell stays", default=False)


@contextmanager
def every_cell() -> Iterator[None]:
    """Let every cell of an image stay within the block, whatever a classifier takes it for: to warm up with blank images."""
    token = _EVERY_CELL.set(True)
    try:
        yield
    finally:
        _EVERY_CELL.reset(token)


def foreground(
    scheduled: ScheduledModel, prompt: Prompt, inputs: dict[str, Any], copies: int
) -> tuple[Prompt, Family]:
    """Return a prompt with the cells of its images that stay, and a family that encodes those alone; videos stay whole.

    An output that is needed at a place of an image keeps that place, beside those that are chosen.

    Args:
        copies: of each row and, one by one, of each patch that generate made.

    Raises:
        InputError: placeholders and images do not match, or there are no pixels.
    """
    family = scheduled.family
    kind = family.modality("image")
    assert kind is not None
    if not kind.given(inputs):
        return prompt, family
    if inputs.get(PIXELS) is None or inputs.get(GRID) is None:
        raise needs_pixels(scheduled.schedule, "since it chooses by them")
    at = family.modalities.index(kind)
    places = prompt.kinds[at][::copies]
    chosen = _chosen(scheduled, once(inputs, copies) if copies > 1 else inputs)
    lengths = [len(each) for each in chosen]
    rows = count_images(places, lengths, kind.name)
    needed = prompt.needed[::copies][places].split(lengths)
    kept = [stays | forced for stays, forced in zip(chosen, needed, strict=True)]
    empty = sum(not bool(each.any()) for each in kept)
    if empty:
        scheduled.log_once(
            f"before={scheduled.schedule.before} found no foreground in {empty} of {len(kept)} images of a call: they leave "
            "no token, as if they were not in the prompt",
            logging.WARNING,
        )
    stays = places.clone()
    stays[places] = torch.cat(kept)
    stays = stays.repeat_interleave(copies, dim=0)
    kinds = (*prompt.kinds[:at], stays, *prompt.kinds[at + 1 :])
    some = replace(
        family,
        modalities=(*family.modalities[:at], keeping(kind, kept), *family.modalities[at + 1 :]),
    )
    pending = iter(lengths)
    repeated = [n for count in rows for n in [*islice(pending, count)] * copies]
    whole = [repeated if i == at else None for i in range(len(kinds))]
    return shortened(scheduled, prompt, kinds, whole), some


def _chosen(scheduled: ScheduledModel, inputs: dict[str, Any]) -> list[Tensor]:
    """Return which cells of each image are foreground, bool [cells] on the host."""
    reduction = scheduled.schedule.reduction
    assert reduction is not None
    classifier = given_modules(scheduled.model).get("classifier")
    if classifier is None:
        raise InputError(
            f"before={reduction} runs a trained classifier, and the model has none: hidrop.compile(model, schedule, "
            "modules={'classifier': classifier})"
        )
    base, config = scheduled.base, scheduled.base.visual.config
    shapes = grids(base, inputs[GRID])
    if _EVERY_CELL.get():
        return [torch.ones(t * h * w, dtype=torch.bool, device="cpu") for t, h, w in shapes]
    cells = first_frames(
        inputs[PIXELS],
        channels=cell_shape(base)[0],
        frames=config.temporal_patch_size,
        side=config.patch_size,
        merge=config.spatial_merge_size,
    )
    logits = classified(classifier, cells).split([t * h * w for t, h, w in shapes])
    masks = [
        reduction.reducer.function(each.view(shape)).flatten()
        for each, shape in zip(logits, shapes, strict=True)
    ]
    joined = torch.cat(masks).cpu()  # the one wait for the device
    return list(joined.split([len(mask) for mask in masks]))
