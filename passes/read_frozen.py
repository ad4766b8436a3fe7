"""Let text attend to vision tokens that no layer updates.

    merged = merge(hidden, vision_embeds)                    # the features as they entered, at every layer
    k, v   = k_proj(norm(merged)), v_proj(norm(merged))
    out    = attention(q, k, v, mask[text, merged])          # one softmax over text and vision

Before:  %attention = hidrop.attention(%q, %k, %v, %mask, ...)
After:   %merge_tokens_1 = merge_tokens(%add_41, %vision_embeds, %merge_index)
         %reading_mask = reading_mask(%text_columns, %merge_columns)
         %attention = hidrop.attention(%q, %k_1, %v_1, %reading_mask, ...)

Layers that do not read attend to text alone. Where the system prompt is frozen too, attention adds nothing to it, in any
layer; its MLPs run, and its keys are read.
"""

from functools import partial

from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.errors import PassError
from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention import CapturedArguments
from hidrop_fx.ops.masks import reading_mask
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program, SegmentNodes


def read_frozen(program: Program, plan: Plan) -> PassResult:
    """Compute the keys and values of the reading layers from text and frozen vision tokens."""
    layers = plan.schedule.reads or ()
    if layers:
        _read(program, plan, layers)
    if plan.schedule.freeze_system:
        columns = program.segment_of(0).columns
        table = program.placeholder_named("column_is_vision")
        first = program.regions[0].nodes[0]
        system = program.call(tokens.system_tokens, columns, table, before=first)
        for region in program.regions:
            _hold(program, region, system)
    return PassResult(matched=len(layers), note=f"at layer {', '.join(map(str, layers))}")


def _read(program: Program, plan: Plan, layers: tuple[int, ...]) -> None:
    first = program.regions[layers[0]].nodes[0]
    read = program.segment(plan.layers[layers[0]].key)
    rows = program.segment_of(layers[0])
    assert read.columns is not None
    assert rows.columns is not None
    vision = program.placeholder_named("vision_embeds")
    columns = program.placeholder_named("vision_columns")
    slots = program.placeholder_named(f"slots_{read.name}")
    index = program.call(tokens.merge_index, rows.columns, columns, slots, before=first)
    entering = program.entry.insert(vision, program.graph, before=first)
    rope = {
        rows.live_ins[live_in]: program.call(tokens.take_tokens, table, read.columns, before=first)
        for live_in, table in program.tables.rope.items()
    }
    masks: dict[tuple[int | None, int | None], fx.Node] = {}
    for layer in layers:
        region = program.regions[layer]
        window, chunk = key = _window(program, region)
        if key not in masks:
            given = [rows.columns, read.columns, window]
            given += [] if chunk is None else [program.tables.chunks[chunk]]
            masks[key] = program.call(reading_mask, *given, before=region.nodes[0])
        call = partial(program.call, before=region.nodes[0])
        merged = call(tokens.merge_tokens, region.hidden, entering, index)
        _attend(program, region, read, {region.hidden: merged, **rope}, masks[key])


def _attend(
    program: Program,
    region: Region,
    read: SegmentNodes,
    given: dict[fx.Node, fx.Node],
    mask: fx.Node,
) -> None:
    """Let a layer attend to the tokens of a segment, whose keys and values become nodes of its own.

    Args:
        given: hidden states and RoPE of the layer's rows -> those of the segment.
    """
    captured = CapturedArguments.of(region.attention)
    wanted = [captured.key, captured.value]
    known = {*program.graph.nodes}
    copies = program.copy_slice(wanted, given, before=region.attention)
    new = [copies[node] for node in wanted]
    for old, node in zip(wanted, new, strict=True):
        node.meta["val"] = program.resized(old.meta["val"], read.length)
    region.nodes = sorted([*region.nodes, *(n for n in program.graph.nodes if n not in known)])
    region.attention.args = (captured.query, *new, mask, *region.attention.args[4:])
    program.keys[region.layer] = read.name


def _window(program: Program, region: Region) -> tuple[int | None, int | None]:
    """Return the window and the chunk of a layer in this call; None where all before a query is in it.

    Raises:
        PassError: the layer's tokens see each other by more than their order.
    """
    for captured, rule in program.tables.masks.items():
        if region.live_ins.get(captured) is CapturedArguments.of(region.attention).mask:
            if rule.blocks is not None:
                raise PassError(
                    f"{region.path} lets the tokens of an image see each other both ways, and under reads= no layer "
                    "updates them; use a schedule with inject, prune and exit"
                )
            return rule.window, rule.chunk
    return None, None


def _hold(program: Program, region: Region, system: fx.Node) -> None:
    """Take the system prompt out of what a layer's attention returns.

    Raises:
        PassError: zeros do not stay zeros on the way to the hidden states.
    """
    attention = region.attention
    with program.graph.inserting_after(attention):
        held = program.graph.call_function(tokens.hold, (attention, system))
    attention.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)
    held.meta |= {k: attention.meta[k] for k in ("val", "nn_module_stack") if k in attention.meta}
    held.meta["hidrop"] = tokens.hold.__name__
    region.nodes.insert(region.nodes.index(attention) + 1, held)
    _check_output_projection(program, region, held)


def _check_output_projection(program: Program, region: Region, node: fx.Node) -> None:
    inside, pending = set(region.nodes), [node]
    while pending:
        for user in pending.pop().users:
            if user not in inside:
                continue
            if "linear" not in str(user.target):
                pending.append(user)
            elif len(user.args) > 2 and user.args[2] is not None:
                raise PassError(
                    f"freeze_system=True needs an output projection without a bias, which {region.path} has "
                    f"({program.describe(user)}); use freeze_system=False"
                )
            else:
                return
