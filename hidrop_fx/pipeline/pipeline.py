"""The passes that make a program, in order, with the reasons for the order.

    program = build_program(captured, plan, "prefill", Variant(output="chosen"))

The order is a list; the reason for each place stands beside it.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

import hidrop_fx.passes as passes
from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.errors import PassError
from hidrop_fx.ops.packed_attention import PACKED
from hidrop_fx.pipeline.custom_passes import apply_custom, names_of
from hidrop_fx.pipeline.event_passes import EVENT_PASSES
from hidrop_fx.planning import Plan
from hidrop_fx.program.pass_function import Pass, pass_name, substitute_of
from hidrop_fx.program.program import Program
from hidrop_fx.program.variant import Kind, Variant
from hidrop_fx.program.verify import check_tokens
from hidrop_fx.surroundings import neutral_surroundings

logger = logging.getLogger("hidrop_fx")


@neutral_surroundings()
def build_program(
    captured: CapturedDecoder,
    plan: Plan,
    kind: Kind,
    variant: Variant = Variant(),
    *,
    kernel: str = "sdpa",
    custom: Sequence[Pass] = (),
    disable: Collection[str] = (),
    branch: CapturedDecoder | None = None,
) -> Program:
    """Rewrite a captured decoder for one purpose.

    Args:
        kind: "prefill" fills KV buffers, "train" has none, "decode" reads and extends them.
        kernel: of attention in prefill and train; `ATTENTIONS`.
        custom: custom passes, in order.
        disable: names of passes to leave out, to see whether one of them is at fault: built-in ones that
            `optional_passes` lists, in prefill and train, and custom passes in all programs.
        branch: layers of a side branch, captured as a decoder of their own, where a score of the plan reads one.

    Raises:
        PassError: a pass found no place in this graph, or left it in a wrong state.
    """
    check_optional(disable, custom)
    program = Program(captured, plan, kind, variant, branch=branch)
    wanted = [pass_fn for pass_fn in custom if pass_name(pass_fn) not in disable]
    deepstack = captured.deepstack is not None
    reads = plan.schedule.reads is not None
    for pass_fn, options in passes_for(
        kind,
        variant,
        kernel,
        wanted,
        deepstack=deepstack,
        reads=reads,
        cuts=plan.schedule.cut is not None,
        narrows=plan.schedule.bottleneck is not None,
        spread=captured.placement is not None and captured.placement.spread,
    ):
        if pass_fn in wanted:
            apply_custom(program, pass_fn)
            _check_custom_lengths(program, pass_fn)
            continue
        if pass_name(pass_fn) in disable and kind != "decode":
            substitute = substitute_of(pass_fn)
            if substitute is None or substitute.options is None:
                continue
            options = substitute.options
        program.apply(pass_fn, **options)
    check_lengths(program)
    check_tokens(program, complete=True)
    _ = program.declared_inputs  # raises where nothing fills one
    program.module.recompile()
    summary = ", ".join(f"{s.name} ({s.result.matched})" for s in program.history)
    logger.debug("%s program: %s", kind, summary)
    return program


def passes_for(
    kind: Kind,
    variant: Variant,
    kernel: str = "sdpa",
    custom: Sequence[Pass] = (),
    *,
    deepstack: bool = False,
    reads: bool = False,
    cuts: bool = False,
    narrows: bool = False,
    spread: bool = False,
) -> list[tuple[Pass, Mapping[str, Any]]]:
    """Return the passes that make a program, in order, each with its options.

    Args:
        deepstack: the model adds features to vision tokens between its layers.
        reads: text attends to vision tokens that are rows of no layer.
        cuts: the schedule cuts caches.
        narrows: caches begin at a bottleneck.
        spread: the decoder lies on several devices.
    """
    between = {"states": True} if variant.states else {}
    cached = {"differentiable": True} if variant.differentiable else {}
    placing: list[tuple[Pass, Mapping[str, Any]]] = [(passes.place_layers, {})] if spread else []
    theirs: list[tuple[Pass, Mapping[str, Any]]] = [(pass_fn, {}) for pass_fn in custom]
    if kind == "decode":
        return [
            (passes.split_streams, {}),
            # As in prefill: with the segments there, and the layers' attention still the captured one.
            *theirs,
            # Replaces the captured attention itself: over buffers there is no causal form.
            (passes.kv_cache, {"masked": variant.masked, **cached}),
            (passes.head, between),
            # Last: it looks at every node, and copies what one device reads of another.
            *placing,
        ]
    return [
        # First: it gives the program its own inputs, which all others read.
        (passes.split_streams, {"masks": variant.masks}),
        # Before vision tokens enter: places of theirs that the text stream holds have no injection.
        *([(passes.deepstack_text, {})] if deepstack and variant.placeholders else []),
        # In the order of the layers: each starts from the segment that the one before it left.
        *((pass_fn, {}) for pass_fn in EVENT_PASSES.values()),
        # After the segments exist, since it adds to what each of them holds.
        *([(passes.deepstack, {"text": variant.placeholders})] if deepstack else []),
        # After the last event, and before keys are renumbered, cached or fused.
        *([(passes.read_frozen, {})] if reads else []),
        # After all segments exist, since it may renumber every one of them.
        (passes.positions, {}),
        # Custom passes: all that decides on tokens is there, and nothing yet that depends on how attention runs.
        *theirs,
        # After every pass that may read the vision tokens: it lets all of them wait.
        *([(passes.overlap_vision, {})] if variant.overlap else []),
        # Before attention, which puts other nodes in place of those that say how it is computed.
        *([(passes.cut_cache, {})] if cuts and kind == "prefill" else []),
        *([(passes.cut_unseen, {})] if narrows and kind == "prefill" else []),
        # After prune, which copies what leads to the captured attention and puts gathered keys in.
        _attention(variant, kernel),
        # After attention: buffers take the keys and values that it really reads.
        *([(passes.kv_cache, cached)] if kind == "prefill" else []),
        # It removes the captured inputs that nothing reads any more.
        (passes.head, {"chosen": variant.output == "chosen", **between}),
        # Last: it looks at every node, and copies what one device reads of another.
        *placing,
    ]


def _attention(variant: Variant, kernel: str) -> tuple[Pass, Mapping[str, Any]]:
    """Return the pass that says how a prompt's layers attend."""
    if variant.behind:
        return passes.attention_over_past, {}
    return passes.attention, {"kernel": kernel} if kernel in PACKED else {}


def optional_passes() -> dict[str, str]:
    """Return the built-in passes that can be disabled, and what is done instead of each."""
    found = {name: substitute_of(getattr(passes, name)) for name in passes.__all__}
    return {name: instead.description for name, instead in found.items() if instead is not None}


def check_optional(names: Collection[str], custom: Sequence[Pass] = ()) -> None:
    """Raise `PassError` unless all of these passes can be left out."""
    optional = optional_passes()
    for name in names:
        if name not in optional and all(name != pass_name(pass_fn) for pass_fn in custom):
            raise PassError(
                f"pass {name!r} cannot be disabled; those that preserve numerics are "
                f"{', '.join(optional)}; passes of your own: {names_of(custom)}. Leave the others out by "
                "the schedule: Schedule() has none of them"
            )


def _check_custom_lengths(program: Program, pass_fn: Pass) -> None:
    try:
        check_lengths(program)  # first: it says more than the operator that fails for it
        check_lengths(program, every_node=True)
    except Exception as error:  # whatever an operator raises that is given what it cannot take
        raise PassError(
            f"the graph does not fit together after the pass {pass_name(pass_fn)}: {error}"
        ) from error


def check_lengths(program: Program, *, every_node: bool = False) -> None:
    """Propagate shapes through a program and compare every layer's length with its segment's.

    A layer returns as many tokens as it reads, so that the glue alone decides whether lengths fit.

    Args:
        every_node: run the layers' own nodes through shape inference too.

    Raises:
        PassError: a layer sees another number of tokens than its segment has.
    """
    regions = {} if every_node else {n: r for r in program.regions for n in r.nodes}
    read = {
        node: program.segment(program.keys[region.layer]).length
        for region in program.regions
        if region.layer in program.keys
        for node in region.attention.args[1:3]
    }
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node in regions:
            if any(regions.get(user) is not regions[node] for user in node.users):
                length = read.get(node, program.segment_of(regions[node].layer).length)
                node.meta["val"] = program.resized(node.meta["val"], length, regions[node].layer)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
            with program.fake_mode:
                node.meta["val"] = node.target(*args, **kwargs)
    for region in program.regions:
        segment = program.segment_of(region.layer)
        for node in (region.hidden, region.live_out):
            found = node.meta["val"].shape[1]
            if found != segment.length:
                raise PassError(
                    f"{region.path} should see the tokens of {program.symbols.name(segment.length)}, but "
                    f"{program.describe(node)} has those of {program.symbols.name(found)}"
                )


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


__all__ = ["build_program", "check_lengths", "check_optional", "optional_passes", "passes_for"]
