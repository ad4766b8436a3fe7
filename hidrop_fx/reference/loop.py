"""Run a schedule the plain way: a loop over the model's own layers, row by row.

    for k, layer in enumerate(decoder.layers):
        for event in events at layer k:
            columns, hidden = event(columns, hidden)     # inject, prune, exit: `eager_events`
        hidden = layer(hidden)

No captured graph, no pass and no padding takes part, so this is what programs are held against. Score functions are those
of `hidrop_fx.methods`, which the prune pass calls too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture.export import attention_implemented_by, configs_of
from hidrop_fx.capture.layers import entering, final_norm, layer_list, text_decoder
from hidrop_fx.capture.temperature import tempered_layers
from hidrop_fx.methods import POSITION_RULES, PositionRule
from hidrop_fx.methods.cache_cuts import Cut, Retroactive
from hidrop_fx.methods.scoring import PROMPT
from hidrop_fx.ops.masks import BlockRule
from hidrop_fx.planning import Event, Plan
from hidrop_fx.planning.geometry import MODULES
from hidrop_fx.reference.eager_events import EAGER_EVENTS
from hidrop_fx.reference.row_attention import RowAttention
from hidrop_fx.reference.rows import (
    PreparedBatch,
    Row,
    RowStates,
    RunningRow,
    row_of,
)

ADDING_PASSES = frozenset({"split_streams", "inject", "deepstack_text", "deepstack", "read_frozen"})
"""Passes that add features of the tower or let text read them, or give tokens several position ids, where a model or schedule
has them."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """The events of a run: those of a plan, or as many of them as some pass has carried out."""

    events: tuple[Event, ...]
    positions: PositionRule = POSITION_RULES[POSITION_RULES.default]
    additions: frozenset[str] = frozenset()
    """Passes that have added features of the tower, each where it does: `inject` to what enters, `deepstack_text`
    up to the injection, `deepstack` behind it; `read_frozen` has let text read frozen tokens, `split_streams` has given
    tokens all their position ids."""
    reads: tuple[int, ...] = ()
    """Layers that read frozen vision tokens."""
    freeze_system: bool = False
    """Attention leaves the text before the first vision token as it is."""
    cut: Cut | None = None
    """What tokens behind the prompt see of it."""
    by_images: bool = False
    """Images are scored by their own last tokens that are there."""
    retroactive: Retroactive | None = None
    """The prune whose survivors are all that they see of it in earlier layers."""

    @classmethod
    def of(cls, plan: Plan) -> "Events":
        """Return all events of a plan."""
        return cls(
            events=plan.events,
            positions=plan.schedule.position_rule,
            additions=ADDING_PASSES,
            reads=plan.schedule.reads or (),
            freeze_system=plan.schedule.freeze_system,
            cut=plan.schedule.cut,
            by_images=plan.schedule.scoring != PROMPT,
            retroactive=plan.schedule.retroactive,
        )


def run_loop(
    model: Any,
    batch: PreparedBatch,
    events: Events,
    *,
    new: Tensor | None = None,
    grad: bool = False,
) -> list[RowStates]:
    """Run every row of a batch through the model's own decoder layers.

    Args:
        new: embeddings [B, n, D] of tokens behind the prompt, which see it as a cache would hold it:
            no query of a score is behind them. Their columns follow each row's last.
        grad: record what a backward needs.
    """
    decoder, attention = text_decoder(model), RowAttention()
    modules = dict(getattr(model, MODULES, nn.Module()).named_children())
    with (
        attention_implemented_by(configs_of(decoder, *modules.values()), attention),
        torch.set_grad_enabled(grad),
    ):
        rows = [row_of(batch, row, None if new is None else new[row]) for row in range(batch.rows)]
        layers = range(len(layer_list(decoder)[1]))
        rules = [batch.block_rule(layer) for layer in layers]
        run = partial(
            _run_row,
            decoder,
            events=events,
            attention=attention,
            block_rules=rules,
            modules=modules,
            tempered=tempered_layers(decoder, *modules.values()),
        )
        cut = events.retroactive
        if cut is not None and new is not None:
            for index, row in enumerate(rows):  # the prompt alone says what its caches are left
                left = run(row_of(batch, index, None)).columns[cut.layer]
                row.left = dict.fromkeys(range(cut.first, cut.layer), left)
        return [run(row) for row in rows]


def _run_row(
    decoder: Any,
    row: Row,
    events: Events,
    attention: RowAttention,
    block_rules: Sequence[BlockRule | None],
    modules: Mapping[str, Any],
    tempered: Sequence[Any],
) -> RowStates:
    row.text_embeds = entering(decoder, row.text_embeds)
    row.vision_embeds = entering(decoder, row.vision_embeds)
    run = RunningRow(
        decoder=decoder,
        row=row,
        rule=events.positions,
        cut=events.cut,
        by_images=events.by_images,
        block_rules=block_rules,
        modules=modules,
        tempered=tempered,
        attention=attention,
        columns=row.text,
        hidden=row.text_embeds,
        before=row.text_embeds,
        states=RowStates(),
        copies="split_streams" in events.additions,
    )
    if row.entering is not None and "inject" in events.additions:
        row.vision_embeds = row.vision_embeds + row.entering
    enters = [event.layer for event in events.events if event.kind == "inject"]
    for layer, module in enumerate(layer_list(decoder)[1]):
        added = row.added(layer, run.columns)
        adding = "deepstack" if enters and layer > enters[0] else "deepstack_text"
        if added is not None and adding in events.additions:
            run.hidden = run.hidden + added
        for event in events.events:
            if event.layer == layer:
                EAGER_EVENTS[event.kind](run, event, module)
        run.before, reading = run.hidden, "read_frozen" in events.additions
        attention.held = run.system if reading and events.freeze_system else None
        frozen = reading and layer in events.reads
        run.hidden = run.run_reading(module, layer) if frozen else run.run(module, layer)
        run.states.columns.append(run.columns)
        run.states.hidden.append(run.hidden)
    run.states.output = final_norm(decoder)(run.hidden)
    return run.states
