"""Lay out and embed a batch as a compiled model does, without running its decoder.

batch = prepare_batch(model, schedule, inputs)
batch.call.text_embeds            # what a program of this schedule would be given
batch.layout.counts               # tokens of every segment, row by row
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.models import Family, family_of
from hidrop_fx.options import Options
from hidrop_fx.planning import Plan
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.planning.geometry import depth_of, vision_tokens_per_image
from hidrop_fx.runtime.call_context import PromptContext
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.prefill import prompt_context
from hidrop_fx.runtime.programs import Programs
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch as the programs of a schedule are given it."""

    call: PromptContext
    """What the inputs of its programs are filled from."""
    programs: Programs
    """Where those programs are made."""

    @property
    def layout(self) -> Layout:
        """Where every token goes."""
        return self.call.layout

    @property
    def schedule(self) -> Schedule:
        """The schedule that the batch is laid out for."""
        return self.layout.plan.schedule

    @property
    def windows(self) -> Mapping[str, int]:
        """Sliding window of each captured mask that has one."""
        return self.call.windows

    @property
    def rows(self) -> int:
        """B"""
        return len(self.layout.last)

    @property
    def columns(self) -> int:
        """L, the length of the prompt with its padding."""
        return self.layout.columns

    def row_columns(self, name: str, row: int) -> Tensor:
        """Return the columns [n] of a row's "text" or "vision" tokens, without the sentinel."""
        columns = self.call.text_columns if name == "text" else self.call.vision_columns
        return columns[row][columns[row] < self.columns]


def prepare_batch(
    model: Any,
    schedule: Schedule,
    inputs: Mapping[str, Any],
    *,
    encode: bool = True,
    grad: bool = False,
) -> Batch:
    """Lay a batch out and embed it.

    Args:
        model: compiled or not.
        schedule: may be another than the model's own.
        inputs: what `model(...)` takes, labels included.
        encode: run the vision tower; otherwise image features are zeros of the right shape.
        grad: record what a backward into the embeddings and the tower needs.

    Raises:
        InputError: a compiled model would refuse these inputs.
    """
    bound = runtime_of(model)
    options = Options(backend="eager", overlap_vision=False)
    made = Plan.of(schedule, depth_of(model))
    programs = Programs(model, made, options) if bound is None else bound.programs
    family = family_of(model)
    if not encode:
        family = replace(family, encode_images=partial(_zeros, model, family, inputs))
    scheduled = ScheduledModel(
        model=model,
        plan=made,
        family=family,
        ratios=bound.ratios if bound is not None and bound.schedule == schedule else None,
    )
    given = {**inputs, "use_cache": False}
    labels = given.pop("labels", None)
    windows = programs.capture().windows
    with torch.set_grad_enabled(grad):
        context = prompt_context(
            scheduled,
            given,
            labels,
            windows=windows,
            kind="train",
            rows="last" if labels is None else "all",
        )
    return Batch(call=context, programs=programs)


def _zeros(
    model: Any, family: Family, given: Mapping[str, Any], base: Any, inputs: dict[str, Any]
) -> list[Tensor]:
    """Return features of zeros, [tokens, D] for each image, in place of the tower's."""
    images = len(inputs[family.pixels])
    fixed = vision_tokens_per_image(model)
    tokens = [fixed] * images if fixed else _placeholders_of_images(model, family, given, images)
    weight = model.get_decoder().get_input_embeddings().weight
    return [weight.new_zeros(count, weight.shape[1]) for count in tokens]


def _placeholders_of_images(
    model: Any, family: Family, given: Mapping[str, Any], images: int
) -> list[int]:
    """Count the placeholders of each image, where its tokens depend on its size."""
    ids = given.get("input_ids")
    if ids is None:
        raise InputError("the tokens of an image depend on its size; pass input_ids to count them")
    rows = (ids == family.placeholder(model.config)).sum(dim=1).tolist()
    rows = [count for count in rows if count]
    if len(rows) == images:
        return rows
    if sum(rows) % images:
        raise InputError(
            f"{images} images have {sum(rows)} placeholders in {len(rows)} rows, from which the tokens of "
            "each cannot be told without the vision tower; explain rows of one image each"
        )
    return [sum(rows) // images] * images
