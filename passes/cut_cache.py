"""Choose what the cache of each layer keeps of a prompt, for each KV head.

    rows   = last `window` tokens of each row
    scores = score(query[rows], keys, values, ...)                        # fp32 [B, G, S]
    index  = rows and the best of the tokens before them, for each KV head  # [B, G, n]
    keys, values = keys[index], values[index]                             # which `kv_cache` writes

Before:  %q, %k, %v = project(%add_59) ; %attention = attention(%q, %k, %v) ; %add_61 = ...
After:   the same, and behind the layer
         %rows = window_rows(%real_tokens, 32) ; %take_keys = take_keys(%q, %rows)
         %scores = window_scores(%take_keys, %k, %v, ...) ; %index = kept_places(%scores, ...)
         return {..., "columns_cut_3": columns_at(%columns, %index)}

The layer itself is as it was: prefill attends to all of its tokens. How many stay is known on the host, so that buffers
hold no more than that, and nothing waits for the device.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.methods.cache_cuts import Cut
from hidrop_fx.ops import cache_cut as ops
from hidrop_fx.ops import tokens
from hidrop_fx.ops.attention import CapturedArguments
from hidrop_fx.planning import LayerCut, Plan
from hidrop_fx.program.inputs import InputSpec, PromptCall
from hidrop_fx.program.outputs import columns_output
from hidrop_fx.program.program import PassResult, Program


def cut_cache(program: Program, plan: Plan) -> PassResult:
    """Choose the tokens of every layer that are written to its cache."""
    cut = plan.schedule.cut
    if cut is None:
        return PassResult(matched=0, note="the schedule leaves caches whole")
    outputs = program.outputs
    rows: dict[str, _Rows] = {}
    for region, planned in zip(program.regions, plan.cuts, strict=True):
        if planned.segment not in rows:
            rows[planned.segment] = _rows(program, region, cut.window)
        outputs[columns_output(planned.name)] = _cut_layer(
            program, region, planned, cut, rows[planned.segment]
        )
    program.returns(outputs)
    return PassResult(matched=len(plan.cuts), note=str(cut))


class _Rows(NamedTuple):
    """Which tokens of a segment are which, the same for all of its layers."""

    real: fx.Node
    last: fx.Node
    """Places [B, W] of the window."""
    past: fx.Node


def _rows(program: Program, region: Region, window: int) -> _Rows:
    columns = program.segment_of(region.layer).columns
    table = program.placeholder_named("column_is_vision")
    call = partial(program.call, before=region.nodes[0])
    real = call(ops.real_tokens, columns, table)
    return _Rows(real, call(ops.window_rows, real, window), call(ops.past_tokens, real, window))


def _cut_layer(program: Program, region: Region, planned: LayerCut, cut: Cut, of: _Rows) -> fx.Node:
    """Choose from one layer's tokens, and return the columns [B, G, n] of those that stay."""
    segment = program.segment_of(region.layer)
    is_vision = program.placeholder_named("column_is_vision")
    captured = CapturedArguments.of(region.attention)
    call = partial(
        program.call,
        before=min(user for user in region.live_out.users),
        subgraph=f"cut_{region.layer}",
    )
    keep, slots = (program.add_input(spec) for spec in _inputs(planned.like))
    given: dict[str, Any] = {
        "key": captured.key,
        "value": captured.value,
        "past": of.past,
        "real": of.real,
        "scale": captured.scale,
        "softcap": captured.softcap,
        "sinks": captured.sinks,
    }
    wanted = cut.rule.reads
    if "query" in wanted:
        given["query"] = call(tokens.take_keys, captured.query, of.last)
    if "seen" in wanted:
        mask = _mask(program, region, captured)
        given["seen"] = (
            call(ops.seen_causally, segment.columns, of.last)
            if mask is None
            else call(ops.take_mask_rows, mask, of.last)
        )
    scores = call(cut.rule.function, *(given[name] for name in wanted))
    scores.kwargs = cut.score_arguments
    index = call(ops.kept_places, scores, of.real, of.past, keep, slots)
    program.cuts[region.layer] = index
    return call(ops.columns_at, segment.columns, index, is_vision)


def _mask(program: Program, region: Region, captured: CapturedArguments) -> fx.Node | None:
    """Return the mask [B, 1, S, S] of a layer's tokens; None where it is causal for this prompt."""
    known = any(region.live_ins.get(each) is captured.mask for each in program.tables.masks)
    return captured.mask if known else None


@cache
def _inputs(name: str) -> tuple[InputSpec, InputSpec]:
    """Return the inputs of the cuts that leave as many tokens: how many in each row, and arange(n)."""
    return (
        InputSpec(f"keep_{name}", ("batch",), torch.int64, partial(_kept, name=name)),
        slots_of(name),
    )


@cache
def slots_of(name: str) -> InputSpec:
    """Return the input arange(n) of the cuts that leave as many tokens as the cut of that name."""
    return InputSpec(f"slots_{name}", (name,), torch.int64, partial(_slots, name=name))


def _kept(call: PromptCall, name: str) -> torch.Tensor:
    return torch.tensor(call.layout.counts[name], device="cpu")


def _slots(call: PromptCall, name: str) -> torch.Tensor:
    return torch.arange(call.layout.lengths[name], device="cpu")
