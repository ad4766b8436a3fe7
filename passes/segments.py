"""Side inputs of a token set, shared by the passes that make a new one."""

from collections.abc import Mapping

from torch import fx

from hidrop_fx.ops import tokens
from hidrop_fx.program.program import Program, SegmentNodes


def rope_of(
    program: Program,
    known: Mapping[fx.Node, fx.Node],
    ids: fx.Node,
    new_ids: fx.Node,
    *,
    before: fx.Node,
) -> dict[fx.Node, fx.Node]:
    """What depends on position ids alone (cos, sin), for other ids than those of `known`.

    It is computed again from the new ones, by a copy of the nodes that computed it from `ids`.
    """
    copies = program.copy_slice(list(known.values()), {ids: new_ids}, before=before)
    return {live_in: copies[node] for live_in, node in known.items()}


def new_segment(
    program: Program,
    *,
    layer: int,
    reason: str,
    length: int,
    columns: fx.Node,
    before: fx.Node,
    subgraph: str | None = None,
) -> SegmentNodes:
    """A segment of the tokens at `columns`: its live_in inputs are the rows of their tables."""
    live_ins = {}
    for live_in, table in program.rope_tables.items():
        live_ins[live_in] = program.call(
            tokens.take_tokens, table, columns, before=before, subgraph=subgraph
        )
    for live_in, table in program.mask_tables.items():
        live_ins[live_in] = program.call(
            tokens.take_mask, table, columns, before=before, subgraph=subgraph
        )
    return SegmentNodes(
        start=layer, reason=reason, length=length, columns=columns, live_ins=live_ins
    )
