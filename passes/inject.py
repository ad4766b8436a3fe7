"""Let the vision tokens join the sequence at their own places.

    order  = argsort(cat([text_columns, vision_columns]))         # invalid tokens come last
    hidden = cat([hidden, vision_embeds])[order]
    columns, cos, sin = ...                                        # of the merged tokens

Before:  %add_47 = layers.8(%add_41, %cos, %sin)
After:   %merge_tokens = merge_tokens(%add_41, %vision_embeds, %merge_index)
         %add_47 = layers.8(%merge_tokens, %cos_1, %sin_1)

The projector's outputs join as they are: no layer before the injection has seen them.
"""

import torch

from hidrop_fx.ops import tokens
from hidrop_fx.passes.segments import new_segment
from hidrop_fx.planning.plan import Plan
from hidrop_fx.program.program import PassResult, Program


def inject(program: Program, plan: Plan) -> PassResult:
    layer = plan.schedule.inject
    region = program.regions[layer]
    before = region.nodes[0]
    text = program.segments[-1]
    assert text.columns is not None

    vision = program.new_length("vision")
    embeds = program.add_input(
        "vision_embeds", (program.batch, vision, program.width), program.dtype
    )
    columns = program.add_input("vision_columns", (program.batch, vision), torch.int64)
    length = program.new_length(f"inject_{layer}")
    slots = program.add_input(f"slots_inject_{layer}", (length,), torch.int64)

    index = program.call(tokens.merge_index, text.columns, columns, slots, before=before)
    hidden = program.call(tokens.merge_tokens, region.hidden, embeds, index, before=before)
    merged = program.call(tokens.merge_columns, text.columns, columns, index, before=before)
    segment = new_segment(
        program, layer=layer, reason="inject", length=length, columns=merged, before=before
    )

    region.read(region.hidden, hidden)
    region.hidden = hidden
    program.enter(segment)
    return PassResult(matched=1, note=f"vision joins at layer {layer}")
