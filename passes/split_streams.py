"""Run the decoder on the text stream, and give the program its own inputs.

    hidden = text_embeds                                   # was: inputs_embeds, text and vision
    cos, sin = rope(column_position_ids)                   # once, for every column
    cos, sin = cos[text_columns], sin[text_columns]        # gaps stay where the images are
    for layer in layers: hidden = layer(hidden, cos, sin)

Before, in a captured graph:

    %inputs_embeds, %position_ids, %mask
    %cos, %sin = rope(%position_ids)
    %add_5 = layers.0(%inputs_embeds, %cos, %sin, %mask)

After:

    %text_embeds, %text_columns, %column_position_ids, %column_is_vision
    %cos_1, %sin_1 = rope(%column_position_ids)
    %take_tokens = take_tokens(%cos_1, %text_columns) ; %take_tokens_1 = ...
    %add_5 = layers.0(%text_embeds, %take_tokens, %take_tokens_1, %mask)

Where a schedule gives tokens several position ids on each axis, rope runs on each of them, and each dimension is taken from
the one of its part (`tokens.by_parts`).

In decode there is one new token a row and nothing to split: each segment of the schedule becomes a
segment that reads the program's `position_ids`, or its own where the schedule renumbers.
"""

from functools import partial

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import embeddings_of
from hidrop_fx.errors import PassError
from hidrop_fx.ops import tokens
from hidrop_fx.ops.masks import MaskRule
from hidrop_fx.passes.segments import chunks_input, floors_input, new_segment, rope_of
from hidrop_fx.planning import Plan
from hidrop_fx.planning.event_kinds import EVENT_KINDS
from hidrop_fx.planning.plan import TEXT
from hidrop_fx.program.inputs import DecodeCall, InputSpec, PromptCall
from hidrop_fx.program.program import PassResult, Program, SegmentNodes, Tables


def split_streams(
    program: Program, plan: Plan, *, masks: tuple[tuple[str, MaskRule], ...] = ()
) -> PassResult:
    """Give the program its own inputs, and let every layer read the text stream.

    Args:
        masks: names of the captured masks that are not plain causal, and the rules that replace them.
    """
    captured = _captured_sides(program)
    if program.kind == "decode":
        return _split_decode(program, plan, captured)

    first = program.regions[0].nodes[0]
    several = plan.schedule.position_copies
    text, columns, *_ = [program.add_input(spec) for spec in _inputs(program, several)]
    program.tables = Tables(
        rope=_rope_tables(program, captured, several, before=first),
        masks={program.placeholder_named(name): rule for name, rule in masks},
        blocks=_blocks(program) if any(rule.blocks for _, rule in masks) else None,
        floors=floors_input(program) if any(rule.floors for _, rule in masks) else None,
        chunks={
            rule.chunk: chunks_input(program, rule.chunk)
            for _, rule in masks
            if rule.chunk is not None
        },
    )

    region = program.regions[0]
    captured_hidden, graph = region.hidden, program.graph
    hidden = program.entry.insert(text, graph, before=first)
    region.read(captured_hidden, hidden)
    region.hidden = hidden
    program.entry.erase(captured_hidden, graph)
    program.enter(new_segment(program, plan.segment(TEXT), columns=columns, before=first))
    return PassResult(matched=1)


def _inputs(program: Program, copies: int) -> list[InputSpec]:
    columns, width = ("batch", "columns"), program.width
    axes, ids = _axes(program), _column_ids
    if copies > 1:
        axes, ids = (copies, *axes), _column_id_copies
    return [
        InputSpec("text_embeds", ("batch", TEXT, width), program.dtype, lambda c: c.text_embeds),
        InputSpec("text_columns", ("batch", TEXT), torch.int64, lambda c: c.text_columns),
        InputSpec("column_position_ids", (*axes, *columns), torch.int64, ids),
        InputSpec("column_is_vision", columns, torch.bool, lambda c: c.layout.is_vision),
    ]


def _column_ids(call: PromptCall) -> Tensor:
    return call.layout.position_ids


def _column_id_copies(call: PromptCall) -> Tensor:
    found = call.layout.position_copies
    assert found is not None
    return found


def _captured_sides(program: Program) -> dict[fx.Node, fx.Node]:
    """Return the live-ins as captured, masks aside; each must depend on the position ids alone."""
    masks = {program.placeholder_named(name) for name in program.captured.masks}
    live_ins = {s: s for region in program.regions for s in region.live_ins if s not in masks}
    for live_in in live_ins:
        if live_in.op == "placeholder":
            raise PassError(
                f"{program.regions[0].path} reads the input {program.describe(live_in)}, which is neither a "
                "mask nor made from position ids; a pass would not know how to cut it"
            )
    return live_ins


def _rope_tables(
    program: Program, captured: dict[fx.Node, fx.Node], copies: int, *, before: fx.Node
) -> dict[fx.Node, fx.Node]:
    for live_in in captured:
        shape = program.resized(live_in.meta["val"], program.tokens).shape
        if shape[:2] != (program.batch, program.tokens):
            raise PassError(
                f"{program.regions[0].path} reads {program.describe(live_in)}, which is not one row for each "
                "token of a batch; a pass would not know how to gather it"
            )
    given = program.placeholder_named("position_ids")
    table = program.placeholder_named("column_position_ids")
    if copies == 1:
        return rope_of(program, captured, given, table, before=before)
    width = next(iter(captured)).meta["val"].shape[-1]
    parts = program.add_input(
        InputSpec("rope_parts", (int(width),), torch.int64, lambda c: c.rope_parts)
    )
    folded = program.call(tokens.fold_copies, table, before=before)
    of_each = rope_of(program, captured, given, folded, before=before)
    return {
        live_in: program.call(tokens.by_parts, node, parts, copies, before=before)
        for live_in, node in of_each.items()
    }


def _blocks(program: Program) -> fx.Node:
    dims = ("batch", "columns")
    return program.add_input(InputSpec("column_blocks", dims, torch.int64, lambda c: c.blocks))


def _split_decode(program: Program, plan: Plan, captured: dict[fx.Node, fx.Node]) -> PassResult:
    first = program.regions[0].nodes[0]
    given = program.placeholder_named("position_ids")
    length = embeddings_of(program.graph).meta["val"].shape[1]
    axes = _axes(program)
    program.fill("inputs_embeds", lambda call: call.embeds)
    program.fill("position_ids", partial(_new_ids, segment=TEXT, axes=axes))
    renumbers = plan.schedule.position_rule.renumbers_after_prunes
    renumbered = False
    for planned in plan.segments:
        kind = EVENT_KINDS.get(planned.reason)
        renumbered |= renumbers and kind is not None and kind.removes
        segment = SegmentNodes(planned=planned, length=length, columns=None, live_ins=captured)
        if renumbered:
            fill = partial(_new_ids, segment=segment.name, axes=axes)
            dims: tuple[str | int, ...] = (*axes, "batch", "tokens")
            spec = InputSpec(f"position_ids_{segment.name}", dims, torch.int64, fill)
            ids = program.add_input(spec)
            segment.live_ins = rope_of(program, captured, given, ids, before=first)
        program.enter(segment)
    return PassResult(matched=len(program.segments))


def _axes(program: Program) -> tuple[int, ...]:
    """Return the dimensions of position ids before batch and length: none, or their axes."""
    shape = program.placeholder_named("position_ids").meta["val"].shape
    return tuple(int(size) for size in shape[:-2])


def _new_ids(call: DecodeCall, segment: str, axes: tuple[int, ...]) -> Tensor:
    ids = call.position_ids(segment)  # behind a prompt all axes agree
    return ids.repeat(*axes, 1, 1) if axes else ids
