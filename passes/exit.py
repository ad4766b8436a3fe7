"""Let all vision tokens leave; the layers from here on see the text stream alone.

    kept   = ~is_vision
    hidden = hidden[kept]

Before:  %add_149 = layers.24(%add_143, %cos_5, %sin_5)
After:   %take_tokens = take_tokens(%add_143, %index)
         %add_149 = layers.24(%take_tokens, %cos_6, %sin_6)
"""

import torch

from hidrop_fx.ops import tokens
from hidrop_fx.passes.segments import new_segment
from hidrop_fx.planning.plan import Plan
from hidrop_fx.program.program import PassResult, Program


def exit_vision(program: Program, plan: Plan) -> PassResult:
    layer = plan.schedule.exit
    if layer is None or layer >= len(program.regions):
        return PassResult(matched=0, note="no layer after the exit")
    region = program.regions[layer]
    before = region.nodes[0]
    segment = program.segments[-1]
    assert segment.columns is not None

    length = program.new_length(f"exit_{layer}")
    slots = program.add_input(f"slots_exit_{layer}", (length,), torch.int64)
    is_vision = program.placeholder_named("column_is_vision")
    columns = program.call(tokens.text_columns, segment.columns, is_vision, slots, before=before)
    index = program.call(tokens.find_columns, segment.columns, columns, before=before)
    hidden = program.call(tokens.take_tokens, region.hidden, index, before=before)
    text = new_segment(
        program, layer=layer, reason="exit", length=length, columns=columns, before=before
    )

    region.read(region.hidden, hidden)
    region.hidden = hidden
    program.enter(text)
    return PassResult(matched=1, note=f"vision leaves at layer {layer}")
