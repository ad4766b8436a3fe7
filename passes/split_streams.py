"""Run the decoder on the text stream, and give the program its own inputs.

    hidden = text_embeds                                   # was: inputs_embeds, text and vision
    cos, sin = rope(column_position_ids[text_columns])     # gaps stay where the images are
    for layer in layers: hidden = layer(hidden, cos, sin)

Before, in a captured graph:

    %inputs_embeds, %position_ids, %mask
    %cos, %sin = rope(%position_ids)
    %add_5 = layers.0(%inputs_embeds, %cos, %sin, %mask)

After:

    %text_embeds, %text_columns, %column_position_ids, %column_is_vision
    %lookup = lookup(%column_position_ids, %text_columns)
    %cos, %sin = rope(%lookup)
    %add_5 = layers.0(%text_embeds, %cos, %sin, %mask)

In decode there is one new token a row and nothing to split: each segment of the schedule becomes a
stream that reads the program's `position_ids`, or its own where the schedule renumbers.
"""

import torch

from hidrop_fx import tokens
from hidrop_fx.errors import PassError
from hidrop_fx.passes.streams import sides_at
from hidrop_fx.planning import Plan
from hidrop_fx.program import PassResult, Program, Stream


def split_streams(program: Program, plan: Plan, *, masks: tuple[str, ...] = ()) -> PassResult:
    """Args: masks: names of the captured masks that are not plain causal; tables replace them."""
    captured = _captured_stream(program)
    if program.kind == "decode":
        return _split_decode(program, plan, captured)

    first = program.regions[0].nodes[0]
    length, columns_and_one = program.new_length("text"), program.new_length("columns")
    table_shape = (program.batch, columns_and_one)
    text = program.add_input("text_embeds", (program.batch, length, program.width), program.dtype)
    columns = program.add_input("text_columns", (program.batch, length), torch.int64)
    table = program.add_input("column_position_ids", table_shape, torch.int64)
    program.add_input("column_is_vision", table_shape, torch.bool)
    _mask_tables(program, masks, columns_and_one)

    region = program.regions[0]
    region.read(region.hidden, text)
    region.hidden = text
    position_ids = program.call(tokens.lookup, table, columns, before=first)
    captured.sides |= {mask: mask for mask in program.mask_tables}
    sides = sides_at(program, captured, position_ids, columns, before=first)
    program.enter(
        Stream(
            start=0,
            reason="text",
            length=length,
            columns=columns,
            position_ids=position_ids,
            sides=sides,
        )
    )
    return PassResult(matched=1)


def _captured_stream(program: Program) -> Stream:
    """The sides as captured; each must be a mask or depend on the position ids alone."""
    position_ids = program.placeholder_named("position_ids")
    masks = {program.placeholder_named(name) for name in program.captured.masks}
    sides = {s: s for region in program.regions for s in region.sides if s not in masks}
    for side in sides:
        if side.op == "placeholder":
            raise PassError(
                f"{program.regions[0].path} reads the input {program.describe(side)}, which is neither a "
                "mask nor made from position ids; a pass would not know how to cut it"
            )
    return Stream(
        start=0,
        reason="captured",
        length=position_ids.meta["val"].shape[1],
        columns=None,
        position_ids=position_ids,
        sides=sides,
    )


def _mask_tables(program: Program, masks: tuple[str, ...], size: int) -> None:
    for name in masks:
        shape = (program.batch, 1, size, size)
        table = program.add_input(f"column_{name}", shape, torch.bool)
        program.mask_tables[program.placeholder_named(name)] = table


def _split_decode(program: Program, plan: Plan, captured: Stream) -> PassResult:
    first = program.regions[0].nodes[0]
    given = captured.position_ids
    renumbers = plan.schedule.positions == "compact"
    renumbered = False
    for layer, reason in plan.schedule.events(len(program.regions)):
        renumbered |= renumbers and reason in ("prune", "exit")
        stream = Stream(
            start=layer,
            reason=reason,
            length=captured.length,
            columns=None,
            position_ids=given,
            sides=captured.sides,
        )
        if renumbered:
            shape = tuple(given.meta["val"].shape)
            name = f"position_ids_{stream.name}"
            stream.position_ids = program.add_input(name, shape, torch.int64)
            stream.sides = sides_at(program, captured, stream.position_ids, None, before=first)
        program.enter(stream)
    return PassResult(matched=len(program.streams))
