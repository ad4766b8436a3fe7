"""Let the vision tokens join the sequence at their own places.

    order  = argsort(cat([text_columns, vision_columns]))         # invalid tokens come last
    hidden = cat([hidden, vision_embeds])[order]
    columns, cos, sin = ...                                        # of the merged tokens

Before:  %add_47 = layers.8(%add_41, %cos, %sin)
After:   %merge_tokens = merge_tokens(%add_41, %vision_embeds, %merge_index)
         %add_47 = layers.8(%merge_tokens, %cos_1, %sin_1)

The projector's outputs join as they are: no layer before the injection has seen them. Of a model that adds further
features on the way (`deepstack`), those that a token missed are added first.
"""

import torch

from hidrop_fx.ops import tokens
from hidrop_fx.passes.segments import new_segment, slots_input
from hidrop_fx.planning import Event, Plan
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.program import PassResult, Program


def inject(program: Program, plan: Plan) -> PassResult:
    """Merge the vision stream into the tokens of every injection's layer."""
    events = plan.of_kind("inject")
    for event in events:
        _inject_at(program, plan, event)
    layers = ", ".join(str(event.layer) for event in events)
    return PassResult(matched=len(events), note=f"vision joins at layer {layers}")


def _inject_at(program: Program, plan: Plan, event: Event) -> None:
    region = program.regions[event.layer]
    before = region.nodes[0]
    text, planned = program.parent_of(event), plan.opened_by(event)
    embeds = program.add_input(
        InputSpec(
            "vision_embeds",
            ("batch", "vision", program.width),
            program.dtype,
            lambda call: call.vision_embeds,
        )
    )
    columns = program.add_input(
        InputSpec(
            "vision_columns", ("batch", "vision"), torch.int64, lambda call: call.vision_columns
        )
    )
    slots = slots_input(program, planned)

    index = program.call(tokens.merge_index, text.columns, columns, slots, before=before)
    vision = program.entry.insert(embeds, program.graph, before=before)
    deepstack = program.captured.deepstack
    missed = () if deepstack is None else deepstack.on_entering(plan.schedule)
    if missed:
        rows = program.add_input(
            InputSpec(
                "vision_additions",
                ("batch", "vision", program.width),
                program.dtype,
                lambda call: call.vision_additions(missed),
            )
        )
        vision = program.call(tokens.add_rows, vision, rows, before=before)
    hidden = program.call(tokens.merge_tokens, region.hidden, vision, index, before=before)
    merged = program.call(tokens.merge_columns, text.columns, columns, index, before=before)
    segment = new_segment(program, planned, columns=merged, before=before)

    region.read(region.hidden, hidden)
    region.hidden = hidden
    program.enter(segment)
