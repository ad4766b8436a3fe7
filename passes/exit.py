"""Let all vision tokens leave; the layers from here on see the text stream alone.

    kept   = ~is_vision
    hidden = hidden[kept]

Before:  %add_149 = layers.24(%add_143, %cos_5, %sin_5)
After:   %take_tokens = take_tokens(%add_143, %index)
         %add_149 = layers.24(%take_tokens, %cos_6, %sin_6)
"""

from hidrop_fx.ops import tokens
from hidrop_fx.passes.segments import new_segment, slots_input
from hidrop_fx.planning import Event, Plan
from hidrop_fx.program.program import PassResult, Program


def exit_vision(program: Program, plan: Plan) -> PassResult:
    """Drop the vision tokens at the layer of every exit."""
    events = plan.of_kind("exit")
    for event in events:
        _exit_at(program, plan, event)
    if not events:
        return PassResult(matched=0, note="no layer after the exit")
    layers = ", ".join(str(event.layer) for event in events)
    return PassResult(matched=len(events), note=f"vision leaves at layer {layers}")


def _exit_at(program: Program, plan: Plan, event: Event) -> None:
    region = program.regions[event.layer]
    before = region.nodes[0]
    segment, planned = program.parent_of(event), plan.opened_by(event)

    slots = slots_input(program, planned)
    is_vision = program.placeholder_named("column_is_vision")
    columns = program.call(tokens.text_columns, segment.columns, is_vision, slots, before=before)
    index = program.call(tokens.find_columns, segment.columns, columns, before=before)
    hidden = program.call(tokens.take_tokens, region.hidden, index, before=before)
    text = new_segment(program, planned, columns=columns, before=before)

    region.read(region.hidden, hidden)
    region.hidden = hidden
    program.enter(text)
