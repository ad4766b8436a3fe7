"""Which passes make a program, in which order, and why.

    program = build_program(captured, plan, "prefill", Variant(output="chosen"))

The order is a list; the reason for each place stands beside it.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx

import hidrop_fx.passes as passes
from hidrop_fx.capture.export import CapturedDecoder
from hidrop_fx.errors import PassError
from hidrop_fx.pipeline.custom_passes import apply_own, names_of
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import Kind, Pass, Program

logger = logging.getLogger("hidrop_fx")

Output = Literal["all", "chosen"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What tells one program from another of its kind."""

    output: Output = "all"
    """Rows that prefill and train return: all, or those at the input `output_columns`."""
    masks: tuple[str, ...] = ()
    """Captured masks that are not plain causal for the lengths at hand."""
    masked: bool = False
    """Decode takes a mask per segment."""
    states: bool = False
    """The hidden states between the layers are returned too."""
    overlap: bool = False
    """The vision tower runs beside the layers before the injection."""


OPTIONAL: dict[str, str] = {
    "attention": "attention is written out as matrix products, not one fused call",
    "kv_cache": "prefill writes no KV buffers",
    "head": "every row is normalised and returned, not the wanted ones alone",
}
"""Passes that change how, and not what, is computed -> what is done instead where one is disabled."""

# Options that a disabled pass runs with; None where it does not run.
_DISABLED: dict[str, Mapping[str, Any] | None] = {
    "attention": {"fused": False},
    "kv_cache": None,
    "head": {"chosen": False},
}


def build_program(
    captured: CapturedDecoder,
    plan: Plan,
    kind: Kind,
    variant: Variant = Variant(),
    *,
    kernel: str = "sdpa",
    own: Sequence[Pass] = (),
    disable: Collection[str] = (),
) -> Program:
    """Rewrite a captured decoder for one purpose.

    Args:
        kind: "prefill" fills KV buffers, "train" has none, "decode" reads and extends them.
        kernel: of attention in prefill and train; `ATTENTIONS`.
        own: passes of the user, in order.
        disable: passes of `OPTIONAL` to leave out of prefill and train, and passes of `own` to leave
            out of all programs, to see whether one of them is at fault.

    Raises:
        PassError: a rewrite has no place in this graph, or left it in a wrong state.
    """
    check_optional(disable, own)
    program = Program(captured, plan, kind)
    wanted = [rewrite for rewrite in own if rewrite.__name__ not in disable]
    for rewrite, options in _pipeline(kind, variant, kernel, wanted):
        if rewrite in wanted:
            apply_own(program, rewrite)
            _check_own_lengths(program, rewrite)
            continue
        if rewrite.__name__ in disable and kind != "decode":
            instead = _DISABLED[rewrite.__name__]
            if instead is None:
                continue
            options = instead
        program.apply(rewrite, **options)
    check_lengths(program)
    _ = program.declared_inputs  # raises where nothing fills one
    program.module.recompile()
    summary = ", ".join(f"{s.name} ({s.result.matched})" for s in program.history)
    logger.debug("%s program: %s", kind, summary)
    return program


def _pipeline(
    kind: Kind, variant: Variant, kernel: str = "sdpa", own: Sequence[Pass] = ()
) -> list[tuple[Pass, Mapping[str, Any]]]:
    between = {"states": True} if variant.states else {}
    theirs: list[tuple[Pass, Mapping[str, Any]]] = [(rewrite, {}) for rewrite in own]
    if kind == "decode":
        return [
            (passes.split_streams, {}),
            # As in prefill: with the segments there, and the layers' attention still the captured one.
            *theirs,
            # Replaces the captured attention itself: over buffers there is no causal form.
            (passes.kv_cache, {"masked": variant.masked}),
            (passes.head, between),
        ]
    return [
        # First: it gives the program its own inputs, which all others read.
        (passes.split_streams, {"masks": variant.masks}),
        # In the order of the layers: each starts from the segment that the one before it left.
        (passes.inject, {}),
        (passes.prune, {}),
        (passes.exit_vision, {}),
        # After all segments exist, since it may renumber every one of them.
        (passes.positions, {}),
        # The user's: all that decides on tokens is there, and nothing yet that depends on how attention runs.
        *theirs,
        # After every pass that may read the vision tokens: it lets all of them wait.
        *([(passes.overlap_vision, {})] if variant.overlap else []),
        # After prune, which copies what leads to the captured attention and puts gathered keys in.
        (passes.attention, {} if kernel == "sdpa" else {"kernel": kernel}),
        # After attention: buffers take the keys and values that it really reads.
        *([(passes.kv_cache, {})] if kind == "prefill" else []),
        # Last: it removes the captured inputs that nothing reads any more.
        (passes.head, {"chosen": variant.output == "chosen", **between}),
    ]


def check_optional(names: Collection[str], own: Sequence[Pass] = ()) -> None:
    """Raise `PassError` unless all of these passes can be left out."""
    for name in names:
        if name not in OPTIONAL and all(name != rewrite.__name__ for rewrite in own):
            raise PassError(
                f"pass {name!r} cannot be disabled; those that preserve numerics are "
                f"{', '.join(OPTIONAL)}; passes of your own: {names_of(own)}. Leave the others out by the "
                "schedule: Schedule() has none of them"
            )


def _check_own_lengths(program: Program, rewrite: Pass) -> None:
    try:
        check_lengths(program)  # first: it says more than the operator that fails for it
        check_lengths(program, every_node=True)
    except Exception as error:  # whatever an operator raises that is given what it cannot take
        raise PassError(
            f"the graph does not fit together after the pass {rewrite.__name__}: {error}"
        ) from error


def check_lengths(program: Program, *, every_node: bool = False) -> None:
    """Propagate shapes through the finished program and hold every layer against its segment.

    A layer returns as many tokens as it reads, so the glue alone decides whether lengths fit;
    `every_node` runs the layers' own nodes through shape inference too.

    Raises:
        PassError: a layer sees another number of tokens than its segment has.
    """
    regions = {} if every_node else {n: r for r in program.regions for n in r.nodes}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node in regions:
            if any(regions.get(user) is not regions[node] for user in node.users):
                length = program.segment_of(regions[node].layer).length
                node.meta["val"] = program.resized(node.meta["val"], length)
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
                    f"{region.path} should see the tokens of {_size(program, segment.length)}, but "
                    f"{program.describe(node)} has those of {_size(program, found)}"
                )


def _size(program: Program, size: int) -> str:
    return program.symbols.get(size, str(size))


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


__all__ = ["OPTIONAL", "Output", "Variant", "build_program", "check_lengths", "check_optional"]
