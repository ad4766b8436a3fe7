"""Token sets in the graph, shared by the passes that make a new one."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx

from hidrop_fx.ops import tokens
from hidrop_fx.ops.masks import MaskRule, rule_mask
from hidrop_fx.planning import Segment
from hidrop_fx.program.inputs import InputSpec, PromptCall
from hidrop_fx.program.program import Program, SegmentNodes

_FLOORS = InputSpec("column_floors", ("batch", "columns"), torch.int64, lambda call: call.floors)


def rope_of(
    program: Program,
    known: Mapping[fx.Node, fx.Node],
    ids: fx.Node,
    new_ids: fx.Node,
    *,
    before: fx.Node,
) -> dict[fx.Node, fx.Node]:
    """Compute what depends on position ids alone (cos, sin) for other ids than those of `known`.

    The nodes that computed it from `ids` are copied, and read the new ones.
    """
    copies = program.copy_slice(list(known.values()), {ids: new_ids}, before=before)
    return {live_in: copies[node] for live_in, node in known.items()}


def new_segment(
    program: Program,
    planned: Segment,
    *,
    columns: fx.Node,
    before: fx.Node,
    subgraph: str | None = None,
) -> SegmentNodes:
    """Make a segment of the tokens at `columns`: its live-ins are the rows of their tables, its masks by rule."""
    call = partial(program.call, before=before, subgraph=subgraph)
    live_ins = {
        live_in: call(tokens.take_tokens, table, columns)
        for live_in, table in program.tables.rope.items()
    }
    live_ins |= {
        live_in: call(
            rule_mask,
            columns,
            program.tables.blocks if rule.blocks else None,
            rule.window,
            rule.blocks == "beyond",
            *_narrowed(program, rule),
        )
        for live_in, rule in program.tables.masks.items()
    }
    length = program.length(planned.name)
    return SegmentNodes(planned=planned, length=length, columns=columns, live_ins=live_ins)


def _narrowed(program: Program, rule: MaskRule) -> list[fx.Node | None]:
    """Return the tables of floors and chunks, as many as it takes to name those that a rule reads."""
    floors = program.tables.floors if rule.floors else None
    if rule.chunk is not None:
        return [floors, program.tables.chunks[rule.chunk]]
    return [] if floors is None else [floors]


def slots_input(program: Program, planned: Segment) -> fx.Node:
    """Declare `arange(T)`, which carries the length of a segment into the graph without a number."""
    fill = partial(_slots, name=planned.name)
    return program.add_input(InputSpec(f"slots_{planned.name}", (planned.name,), torch.int64, fill))


def floors_input(program: Program) -> fx.Node:
    """Declare the first column that each may see, [B, L + 1]."""
    return program.add_input(_FLOORS)


def chunks_input(program: Program, size: int) -> fx.Node:
    """Declare the chunk of each column, [B, L + 1]."""
    dims, fill = ("batch", "columns"), partial(_chunks, size=size)
    return program.add_input(InputSpec(f"column_chunks_{size}", dims, torch.int64, fill))


def _chunks(call: PromptCall, size: int) -> Tensor:
    return call.chunks(size)


def _slots(call: PromptCall, name: str) -> Tensor:
    return torch.arange(call.layout.lengths[name], device="cpu")
