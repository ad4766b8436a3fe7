"""Side inputs of a token set, shared by the passes that make a new one."""

from torch import fx

from hidrop_fx import tokens
from hidrop_fx.program import Program, Stream


def sides_at(
    program: Program,
    known: Stream,
    position_ids: fx.Node,
    columns: fx.Node | None,
    *,
    before: fx.Node,
    piece: str | None = None,
) -> dict[fx.Node, fx.Node]:
    """The side inputs of decoder layers (cos, sin, masks) for other tokens than those of `known`.

    What depends on the position ids alone is computed again from the new ones, by a copy of the
    nodes that computed it for `known`; a mask is gathered from its table.
    """
    positional = [s for side, s in known.sides.items() if side not in program.mask_tables]
    given = {known.position_ids: position_ids}
    copies = program.copy_slice(positional, given, before=before, piece=piece)
    sides = {}
    for side, node in known.sides.items():
        if side not in program.mask_tables:
            sides[side] = copies[node]
        elif columns is not None:
            table = program.mask_tables[side]
            sides[side] = program.call(tokens.take_mask, table, columns, before=before)
    return sides


def new_stream(
    program: Program, *, layer: int, reason: str, slots: fx.Node, columns: fx.Node, before: fx.Node
) -> Stream:
    """A stream of the `len(slots)` tokens at `columns`, with the ids of the position table and its own sides."""
    table = program.placeholder_named("column_position_ids")
    position_ids = program.call(tokens.lookup, table, columns, before=before)
    sides = sides_at(program, program.streams[-1], position_ids, columns, before=before)
    return Stream(
        start=layer,
        reason=reason,
        length=slots.meta["val"].shape[0],
        columns=columns,
        position_ids=position_ids,
        sides=sides,
    )
