"""Side inputs of a token set, shared by the passes that make a new one."""

from collections.abc import Mapping

from torch import fx

from hidrop_fx import tokens
from hidrop_fx.program import Program, Stream


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
    return {side: copies[node] for side, node in known.items()}


def new_stream(
    program: Program,
    *,
    layer: int,
    reason: str,
    length: int,
    columns: fx.Node,
    before: fx.Node,
    piece: str | None = None,
) -> Stream:
    """A stream of the tokens at `columns`: its side inputs are the rows of their tables."""
    sides = {}
    for side, table in program.rope_tables.items():
        sides[side] = program.call(tokens.take_tokens, table, columns, before=before, piece=piece)
    for side, table in program.mask_tables.items():
        sides[side] = program.call(tokens.take_mask, table, columns, before=before, piece=piece)
    return Stream(start=layer, reason=reason, length=length, columns=columns, sides=sides)
