"""Leave out of every layer's cache what no token behind the prompt sees: all before a row's bottleneck.

    kept = columns[columns >= floor]                    # floor: that of tokens behind the prompt
    keys, values = keys[kept], values[kept]             # which `kv_cache` writes

Before:  %q, %k, %v = project(%add_59) ; %attention = attention(%q, %k, %v) ; %add_61 = ...
After:   the same, and at the first layer of each segment
         %places = held_places(%merge_columns, %column_floors, %slots_cut_0)
         %columns = held_columns(%merge_columns, %places, %column_floors)
         return {..., "columns_cut_0": %columns}

Attention has masks by the same floors (`split_streams`). How many tokens stay is known on the host.
"""

from functools import partial

from hidrop_fx.ops import cache_cut as ops
from hidrop_fx.passes.cut_cache import slots_of
from hidrop_fx.passes.segments import floors_input
from hidrop_fx.planning import Plan
from hidrop_fx.program.outputs import columns_output
from hidrop_fx.program.program import PassResult, Program


def cut_unseen(program: Program, plan: Plan) -> PassResult:
    """Choose the tokens of every layer that are written to its cache."""
    outputs, floors = program.outputs, floors_input(program)
    found = {}
    for region, planned in zip(program.regions, plan.cuts, strict=True):
        if planned.like not in found:
            segment, before = program.segment_of(region.layer), region.nodes[0]
            slots = program.add_input(slots_of(planned.like))
            call = partial(program.call, before=before)
            places = call(ops.held_places, segment.columns, floors, slots)
            held = call(ops.held_columns, segment.columns, places, floors)
            found[planned.like] = held, places
        held, places = found[planned.like]
        outputs[columns_output(planned.name)] = held
        program.cuts[region.layer] = places
    program.returns(outputs)
    return PassResult(matched=len(plan.cuts), note=f"from token {plan.schedule.bottleneck} on")
