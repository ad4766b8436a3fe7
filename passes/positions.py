"""Give RoPE the position ids that the schedule asks for.

    persistent:  rope(column_position_ids)[columns]                     # the original ids, always
    compact:     rope([0, 1, 2, ...])[:len(columns)]                    # after each prune and exit
    group:       rope(renumber_text(column_position_ids))[columns]      # text as if without images

Before:  %take_tokens_6 = take_tokens(%cos_1, %columns_2)
After:   %renumber = renumber(%column_position_ids) ; %cos_2, %sin_2 = rope(%renumber)     # compact
         %renumber_1 = renumber(%columns_2) ; %take_tokens_6 = take_tokens(%cos_2, %renumber_1)

Streams are built with persistent ids, so that this pass alone knows the alternatives.
"""

from torch import fx

from hidrop_fx.ops import tokens
from hidrop_fx.passes.segments import rope_of
from hidrop_fx.planning import Plan
from hidrop_fx.planning.event_kinds import EVENT_KINDS
from hidrop_fx.program.program import PassResult, Program


def positions(program: Program, plan: Plan) -> PassResult:
    rule = plan.schedule.position_rule
    if rule.renumbers_after_prunes:
        return _renumber_after_prunes(program)
    if rule.renumbers_text:
        return _renumber_text(program)
    return PassResult(matched=0, note="original position ids everywhere")


def _renumber_after_prunes(program: Program) -> PassResult:
    removing = {name for name, kind in EVENT_KINDS.items() if kind.removes}
    pruned = [s for s in program.segments if s.reason in removing]
    if not pruned:
        return PassResult(matched=0, note="nothing is pruned")
    ids = program.placeholder_named("column_position_ids")
    before: fx.Node = min(ids.users)
    numbers = program.call(tokens.renumber, ids, before=before)
    tables = rope_of(program, program.tables.rope, ids, numbers, before=before)
    for segment in pruned:
        rows = [segment.live_ins[live_in] for live_in in tables]
        places = program.call(tokens.renumber, segment.columns, before=min(rows))
        for table, row in zip(tables.values(), rows, strict=True):
            row.args = (table, places)
    return PassResult(matched=len(pruned))


def _renumber_text(program: Program) -> PassResult:
    table = program.placeholder_named("column_position_ids")
    is_vision = program.placeholder_named("column_is_vision")
    before: fx.Node = min(table.users)
    renumbered = program.call(tokens.renumber_text, table, is_vision, before=before)
    table.replace_all_uses_with(renumbered, delete_user_cb=lambda user: user is not renumbered)
    return PassResult(matched=1)
