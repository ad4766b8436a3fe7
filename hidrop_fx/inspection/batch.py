"""Lay out and embed a batch as a compiled model does, without running its decoder.

batch = prepare_batch(model, schedule, inputs)
batch.call.text_embeds            # what a program of this schedule would be given
batch.layout.counts               # tokens of every segment, row by row
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.capture.layers import embedding_table, text_decoder
from hidrop_fx.capture.placement import home
from hidrop_fx.models import Modality, family_of
from hidrop_fx.models.frozen import check_reads
from hidrop_fx.models.items import check_units
from hidrop_fx.models.tower_tokens import check_reduction
from hidrop_fx.ops.masks import BlockRule
from hidrop_fx.options import Options
from hidrop_fx.planning import Plan
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.planning.deepstack import Deepstack
from hidrop_fx.planning.geometry import depth_of, vision_tokens_per_image
from hidrop_fx.runtime.axes import check_positions
from hidrop_fx.runtime.bottleneck import check_bottleneck
from hidrop_fx.runtime.call_context import PromptContext
from hidrop_fx.runtime.fitting import check_merge
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
    def deepstack(self) -> Deepstack | None:
        """Where the model adds features to vision tokens between its layers."""
        return self.programs.capture().decoder.deepstack

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

    def as_given(self, full: Tensor) -> Tensor:
        """Move rows [B, L, D] of all columns to the columns as they were given."""
        return self.call.prompt.as_given(full)

    def given_columns(self, columns: Tensor, row: int) -> Tensor:
        """Return columns [n] of a row as they were given."""
        room = self.call.prompt.room
        return columns if room is None else columns - room.size * (columns > room.behind[row, 0])

    def block_rule(self, layer: int) -> BlockRule | None:
        """Return how tokens of one block see each other in a layer; None where blocks mean nothing to it."""
        rules = self.call.rules
        if "mask" in rules:
            return rules["mask"].blocks
        config = text_decoder(self.programs.model).config
        rule = rules.get(f"mask_{config.layer_types[layer]}")  # a convolution has none
        return None if rule is None else rule.blocks


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
    under = None if bound is None else bound.under(schedule)
    options = Options(backend="eager", overlap_vision=False)
    made = Plan.of(schedule, depth_of(model))
    programs = Programs(model, made, options) if bound is None else bound.programs
    family = family_of(model)
    check_positions(family, schedule)
    check_units(model, family, schedule)
    check_reduction(model, family, schedule.reduction)
    check_reads(model, family, schedule)
    check_merge(model, schedule)
    check_bottleneck(model, family, schedule)
    if not encode:
        kinds = tuple(_without_tower(model, kind, inputs) for kind in family.modalities)
        family = replace(family, modalities=kinds, deepstack=None)
    scheduled = ScheduledModel(
        model=model,
        plan=made,
        family=family,
        ratios=None if under is None else under.ratios,
        dry_run=not encode,
    )
    given = {**inputs, "use_cache": False}
    labels = given.pop("labels", None)
    rules = programs.capture().rules
    with torch.set_grad_enabled(grad):
        context = prompt_context(
            scheduled,
            given,
            labels,
            rules=rules,
            kind="train",
            rows="last" if labels is None else "all",
        )
    return Batch(call=context, programs=programs)


def _without_tower(model: Any, kind: Modality, given: Mapping[str, Any]) -> Modality:
    """Return a kind whose features are zeros of the right shape, where they can be counted without its tower."""
    if given.get(kind.pixels) is None:
        return kind
    lengths = _lengths(model, kind, given)
    if lengths is None:
        return kind
    decoder, width = text_decoder(model), model.config.get_text_config().hidden_size
    table, device = embedding_table(decoder), home(decoder)
    zeros = [table.new_zeros((count, width), device=device) for count in lengths]
    encoded = SimpleNamespace(pooler_output=zeros)
    return replace(kind, encode=lambda base, inputs: encoded, features=None)


def _lengths(model: Any, kind: Modality, given: Mapping[str, Any]) -> list[int] | None:
    """Count the placeholders of each entry; None where only the tower can tell."""
    told = None if kind.lengths is None else kind.lengths(model.config, given)
    if told is not None:
        return told
    fixed = vision_tokens_per_image(model)
    if fixed and kind.name == "image":
        return [fixed] * len(given[kind.pixels])
    ids = given.get("input_ids")
    if ids is None:
        return None
    rows = (ids == kind.token(model.config)).sum(dim=1).tolist()
    rows = [count for count in rows if count]
    if kind.count is not None:  # rows are as good as entries: items are counted in the prompt
        return rows
    sizes = [given[name] for name in kind.inputs[1:] if given.get(name) is not None]
    images = len(sizes[0]) if sizes and isinstance(sizes[0], Tensor) else len(given[kind.pixels])
    return rows if len(rows) == images else None
