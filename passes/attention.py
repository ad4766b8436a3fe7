"""Replace the captured attention of every layer by one that runs.

    causal:   scaled_dot_product_attention(q, k, v, is_causal=True)       # no mask tensor
    masked:   scaled_dot_product_attention(q, k, v, mask[columns][:, columns])
    packed:   varlen_attn(q[order], k[order], v[order], starts)           # rows end to end
    sinks:    sink_attention(q, k, v, mask, ..., sinks)                   # one more key, fused
    conv:     causal_convolution(x, ...)                          # layers without attention
    state:    causal_recurrence(q, k, v, decay, write, ...)       # and a short convolution in front
    capped:   explicit_attention(q, k, v, mask, ..., softcap)             # two matrix products

Before:  %attention = hidrop.attention(%q, %k, %v, %mask, 0.088, 0.0, None)
After:   %causal_attention = causal_attention(%q, %k, %v, 0.088, 0.0)

Valid tokens come first, in prompt order, so plain causal attention never shows them an invalid one.
Masks that are not plain causal (sliding windows, bidirectional blocks) have a table in the program,
from which `split_streams` and its successors gathered one for each segment.
"""

import logging

from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.ops.attention import (
    CapturedArguments,
    causal_attention,
    masked_attention,
    plain_causal_attention,
)
from hidrop_fx.ops.convolution import ConvolutionArguments, causal_convolution
from hidrop_fx.ops.explicit_attention import explicit_attention, sink_attention
from hidrop_fx.ops.packed_attention import PACKED, packed_attention, packed_order, row_starts
from hidrop_fx.ops.recurrent_rules import rule_of
from hidrop_fx.planning import Plan
from hidrop_fx.program.pass_function import can_be_disabled
from hidrop_fx.program.program import PassResult, Program, SegmentNodes

logger = logging.getLogger("hidrop_fx")


@can_be_disabled(
    "attention is written out as matrix products, not one fused call", {"fused": False}
)
def attention(
    program: Program, plan: Plan, *, fused: bool = True, kernel: str = "sdpa"
) -> PassResult:
    """Replace every layer's attention: causal, over a gathered mask, or over packed rows.

    Args:
        fused: use the fused kernels; otherwise plain matrix products, to rule the kernels out.
        kernel: one of `ATTENTIONS`; those of `PACKED` pack the rows of a padded batch.
    """
    causal = causal_attention if fused else plain_causal_attention
    packs = fused and kernel in PACKED
    packing: dict[str, tuple[fx.Node, fx.Node]] = {}
    masked, unpacked = 0, 0
    branched = [(r, branch.segment) for branch in program.branches for r in branch.regions]
    for region, of_branch in [*((r, None) for r in program.regions), *branched]:
        if region.is_convolution:
            given = ConvolutionArguments.of(region.attention)
            convolved = program.call(causal_convolution, *given, before=region.attention)
            replace_attention(region, convolved)
            continue
        if region.keeps_state:
            _run_recurrence(program, region)
        if not region.attends:
            continue
        captured = CapturedArguments.of(region.attention)
        scale, dropout, old, read = captured[4], captured[5], region.attention, captured[:3]
        mask = captured.mask if _reads_table(program, region) else None
        plain = _fits_kernels(region, captured)
        masked += mask is not None
        unpacked += packs and mask is None and not plain
        if captured.softcap is not None or (captured.sinks is not None and not fused):
            added = (captured.softcap, captured.sinks)
            new = program.call(explicit_attention, *read, mask, scale, dropout, *added, before=old)
        elif captured.sinks is not None:
            sunk = (*read, mask, scale, dropout, captured.sinks)
            new = program.call(sink_attention, *sunk, before=old)
        elif mask is not None:
            new = program.call(masked_attention, *read, mask, scale, dropout, before=old)
        elif packs and plain and not dropout:
            segment = of_branch or program.segment_of(region.layer)
            order, starts = _packed(program, segment, region, packing)
            new = program.call(packed_attention, *read, order, starts, scale, kernel, before=old)
        else:
            new = program.call(causal, *read, scale, dropout, before=old)
        replace_attention(region, new)
    if unpacked:
        logger.info(
            "attention=%r does not serve %d layers, which cap their logits, have sinks or values of another "
            "width than keys: they run as under attention='sdpa'",
            kernel,
            unpacked,
        )
    if packs and masked:
        logger.info(
            "attention=%r is for causal rows: %d layers whose window the prompt exceeds, or whose tokens see each "
            "other both ways, attend to frozen vision tokens or see no further back than a bottleneck, run as under attention='sdpa'",
            kernel,
            masked,
        )
    return PassResult(matched=len(program.regions), note=f"{masked} layers with a mask")


def _run_recurrence(program: Program, region: Region) -> None:
    """Replace a recurrence, and the convolution in front of it; `kv_cache` turns to it again where a state is kept."""
    assert region.convolution is not None
    given = ConvolutionArguments.of(region.convolution)
    halves = [given.states] * 2  # which nobody asks for here
    read = (given.states, *halves, given.weight, given.bias)
    convolved = program.call(causal_convolution, *read, before=region.convolution)
    replace_convolution(region, convolved)
    old = region.recurrence
    assert old is not None
    replace_recurrence(region, program.call(rule_of(old).causal, *old.args, before=old))


def _fits_kernels(region: Region, captured: CapturedArguments) -> bool:
    """Return True for a plain softmax over keys and values of one width."""
    widths = region.kv_shape.key_width == region.kv_shape.value_width
    return widths and captured.softcap is None and captured.sinks is None


def _packed(
    program: Program,
    segment: SegmentNodes,
    region: Region,
    known: dict[str, tuple[fx.Node, fx.Node]],
) -> tuple[fx.Node, fx.Node]:
    """Compute the order and starts of a segment's rows, once, before the first layer that may read them."""
    if segment.name not in known:
        before = min(program.regions[segment.start].nodes[0], region.nodes[0])
        given = (segment.columns, program.placeholder_named("column_is_vision"))
        known[segment.name] = (
            program.call(packed_order, *given, before=before),
            program.call(row_starts, *given, before=before),
        )
    return known[segment.name]


def replace_attention(region: Region, new: fx.Node) -> None:
    """Put another node in the place of a region's attention."""
    old = region.attention
    new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
    old.replace_all_uses_with(new)
    region.nodes.insert(region.nodes.index(old), new)
    region.attention = new


def replace_recurrence(region: Region, new: fx.Node) -> None:
    """Put another node in the place of a region's recurrence."""
    old, alone = region.recurrence, region.is_recurrent
    assert old is not None
    new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
    old.replace_all_uses_with(new)
    region.nodes.insert(region.nodes.index(old), new)
    region.recurrence = new
    if alone:
        region.attention = new


def replace_convolution(region: Region, new: fx.Node) -> None:
    """Put another node in the place of the convolution in front of a region's recurrence."""
    old = region.convolution
    assert old is not None
    new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
    old.replace_all_uses_with(new)
    region.nodes.insert(region.nodes.index(old), new)
    region.convolution = new


def _reads_table(program: Program, region: Region) -> bool:
    mask = region.attention.args[3]
    if region.layer in program.keys:  # what it attends to is not in the order of its rows
        return True
    return any(region.live_ins.get(live_in) is mask for live_in in program.tables.masks)
