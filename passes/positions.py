"""Give RoPE the position ids that the schedule asks for.

    persistent:  ids = column_position_ids[columns]                      # the original ones, always
    compact:     ids = arange(len(columns)) after each prune and exit    # PyramidDrop
    group:       ids = renumber_text(column_position_ids)[columns]       # text as if without images

Before:  %lookup_3 = lookup(%column_position_ids, %columns_2)
After:   %renumber = renumber(%columns_2)                                # compact

Streams are built with persistent ids, so that this pass alone knows the alternatives.
"""

from torch import fx

from hidrop_fx import tokens
from hidrop_fx.planning import Plan
from hidrop_fx.program import PassResult, Program


def positions(program: Program, plan: Plan) -> PassResult:
    kind = plan.schedule.positions
    if kind == "compact":
        return _renumber_after_prunes(program)
    if kind == "group":
        return _renumber_text(program)
    return PassResult(matched=0, note="original position ids everywhere")


def _renumber_after_prunes(program: Program) -> PassResult:
    pruned = [s for s in program.streams if s.reason in ("prune", "exit")]
    for stream in pruned:
        old = stream.position_ids
        stream.position_ids = program.call(tokens.renumber, stream.columns, before=old)
        old.replace_all_uses_with(stream.position_ids)
    return PassResult(matched=len(pruned))


def _renumber_text(program: Program) -> PassResult:
    table = program.placeholder_named("column_position_ids")
    is_vision = program.placeholder_named("column_is_vision")
    before: fx.Node = min(table.users)
    renumbered = program.call(tokens.renumber_text, table, is_vision, before=before)
    table.replace_all_uses_with(renumbered, delete_user_cb=lambda user: user is not renumbered)
    return PassResult(matched=1)
