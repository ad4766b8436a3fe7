"""Give every layer its own key/value buffer.

    prefill:  keys[layer][:, :, :S] = k ; values[layer][:, :, :S] = v
    decode:   keys[layer][:, :, slot] = k ; out = attention(q, keys[layer][:, :, :filled], ...)

Before, in prefill:  %causal_attention = causal_attention(%q, %k, %v, ...)
After:               %write = write_kv(%keys_3, %k) ; %write_1 = write_kv(%values_3, %v)
                     %causal_attention = causal_attention(%q, %k, %v, ...)

Before, in decode:   %attention = hidrop.attention(%q, %k, %v, ...)
After:               %cached = cached_attention(%q, %k, %v, %keys_3, %values_3, %slots_prune_3, ...)

Under gradients, decode leaves its inputs as they are, and both return what they cached, to be read by the
calls behind them:

After:               %keys = extended(%keys_3, %slots_prune_3, %k) ; %values = extended(%values_3, ..., %v)
                     %attention = attention_over(%q, %keys, %values, ...)
                     return {..., "cached_keys_3": %keys, "cached_values_3": %values}

What recurrent layers keep is no list of tokens: `hidrop_fx.passes.recurrent_state` has the nodes for it.

The inputs `keys_3` are views of the filled part of a buffer: each layer of a rewritten decoder has
seen another number of tokens, and none reads or masks room that it does not use.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.ops.attention import (
    CapturedArguments,
    attention_over,
    cached_attention,
    extended,
)
from hidrop_fx.ops.cache_cut import take_by_head, take_held
from hidrop_fx.ops.convolution import (
    ConvolutionArguments,
    cached_convolution,
    columns_of_places,
    convolution_over,
    last_places,
    take_places,
)
from hidrop_fx.ops.tokens import find_columns, take_keys
from hidrop_fx.passes.attention import replace_attention
from hidrop_fx.passes.recurrent_state import go_on, keep_state, state_buffers
from hidrop_fx.planning import Plan
from hidrop_fx.program.inputs import DecodeCall, InputSpec, KVPart, PromptCall
from hidrop_fx.program.outputs import columns_output, keys_output, values_output
from hidrop_fx.program.pass_function import can_be_disabled
from hidrop_fx.program.program import PassResult, Program


class Window(NamedTuple):
    """How far back a layer's tokens see."""

    columns: int | None
    """So many, that end at their own; None for all."""
    chunked: bool = False
    """Those of their own chunk alone, which has so many."""


NO_WINDOW = Window(None)


@can_be_disabled("prefill writes no KV buffers")
def kv_cache(
    program: Program, plan: Plan, *, masked: bool = False, differentiable: bool = False
) -> PassResult:
    """Write keys and values to buffers in prefill; append to them and attend over them in decode.

    Args:
        masked: decode reads a mask per segment (rows of unequal length, sliding windows).
        differentiable: return the keys and values; decode writes to no buffer.
    """
    if program.kind == "decode":
        alike = [plan.cached_like(region.layer) for region in program.regions]
        for name in dict.fromkeys(alike):
            regions = [
                region
                for region, like in zip(program.regions, alike, strict=True)
                if like == name and (region.attends or region.is_convolution)
            ]
            if regions:
                _attend_over_buffers(program, name, regions, masked, differentiable)
        for region in program.regions:
            if region.keeps_state:
                go_on(program, region, masked=masked, differentiable=differentiable)
    else:
        for region in program.regions:
            if region.keeps_state:
                keep_state(program, region)
            _note_tail(program, region)
            _write_buffers(program, region)
    if differentiable:
        program.returns(program.outputs | _cached(program))
    return PassResult(matched=len(program.regions))


def write_kv(buffer: Tensor, states: Tensor) -> None:
    """Fill a layer's buffer [B, G, S, d] in place."""
    buffer.copy_(states.detach())


def _note_tail(program: Program, region: Region) -> None:
    """Find the last tokens of a convolution's segment, which its cache keeps, and return their columns."""
    tail = program.plan.tail_of(region.layer)
    if tail is None or tail.name in program.tails:
        return
    fill = partial(_arange, name=tail.name)
    slots = program.add_input(InputSpec(f"slots_{tail.name}", (tail.name,), torch.int64, fill))
    columns = program.segment(tail.segment).columns
    table = program.placeholder_named("column_is_vision")
    call = partial(program.call, before=region.nodes[0], subgraph=f"{tail.name}_places")
    places = call(last_places, columns, table, slots)
    program.tails[tail.name] = places
    kept = call(columns_of_places, columns, table, places)
    program.returns(program.outputs | {columns_output(tail.name): kept})


def _arange(call: PromptCall, name: str) -> Tensor:
    return torch.arange(call.layout.lengths[name], device="cpu")


def _write_buffers(program: Program, region: Region) -> None:
    cut = program.plan.schedule.retroactive
    last = region if cut is None else program.regions[max(region.layer, cut.layer)]
    after = min(user for user in last.live_out.users)
    pairs: list[tuple[Any, Any]] = []
    if region.keeps_state:
        pairs += zip(state_buffers(program, region), program.states[region.layer], strict=True)
    if region.attends or region.is_convolution:
        buffers = _buffers(program, region, program.plan.cached_like(region.layer))
        pairs += zip(buffers, _kept(program, region, after), strict=True)
    for buffer, node in pairs:
        program.effects.add(program.call(write_kv, buffer, node, before=after))


def _cached(program: Program) -> dict[str, fx.Node]:
    """Return the outputs that hold what each layer caches: in decode all that its attention reads."""
    found: dict[str, Any] = {}
    for region in program.regions:
        kept = {}
        if region.keeps_state:
            kept[region.state_entry] = program.states[region.layer]
        if region.attends or region.is_convolution:
            kept[region.layer] = _kept(program, region, program.graph.output_node())
        for entry, (keys, values) in kept.items():
            assert entry is not None
            found |= {keys_output(entry): keys, values_output(entry): values}
    return found


def _kept(program: Program, region: Region, before: fx.Node) -> tuple[Any, Any]:
    """Return the keys and values that a layer's attention reads, or behind a prompt those that its cache keeps."""
    _, keys, values = region.attention.args[:3]
    planned, places = program.plan.layers[region.layer], program.cuts.get(region.layer)
    last = program.tails.get(planned.cache)
    if last is not None:
        take_last = partial(
            program.call, take_places, before=before, subgraph=f"tail_{region.layer}"
        )
        return take_last(keys, last), take_last(values, last)
    subgraph = f"cut_{region.layer}"
    take: Callable[..., Tensor] = take_by_head
    if places is not None and program.plan.schedule.cut is None:
        take = take_held
    elif places is None:
        if planned.cache == planned.key or program.kind == "decode":
            return keys, values
        own, kept = program.segment(planned.key), program.segment(planned.cache)
        take, call = take_keys, partial(program.call, before=before, subgraph=subgraph)
        places = call(find_columns, own.columns, kept.columns)
    call = partial(program.call, take, before=before, subgraph=subgraph)
    return call(keys, places), call(values, places)


def _attend_over_buffers(
    program: Program, name: str, regions: list[Region], masked: bool, differentiable: bool
) -> None:
    """Let layers attend over buffers of one length, that of the tokens `name`."""
    filled = f"filled_{name}"
    slots = program.add_input(
        InputSpec(f"slots_{name}", ("tokens",), torch.int64, lambda call: call.slots(name))
    )
    for region in regions:
        query, key, value = region.attention.args[:3]
        keys, values = _buffers(program, region, filled, static=not differentiable)
        window, settings, over, cached = _decoding(region)
        mask = _mask_input(program, region, name, window) if masked else None
        how = [mask, *settings]
        call = partial(program.call, before=region.attention)
        if differentiable:
            read = [
                _extended(program, region, buffer, slots, states)
                for buffer, states in ((keys, key), (values, value))
            ]
            new = call(over, query, *read, *how)
        else:
            new = call(cached, query, key, value, keys, values, slots, *how)
        replace_attention(region, new)


def _decoding(
    region: Region,
) -> tuple[Window, list[Any], Callable[..., Tensor], Callable[..., Tensor]]:
    """Return a layer's window, what its attention is given behind a mask, and the functions over buffers."""
    if region.is_convolution:
        given = ConvolutionArguments.of(region.attention)
        return NO_WINDOW, [given.weight, given.bias], convolution_over, cached_convolution
    captured = CapturedArguments.of(region.attention)
    settings = [captured.scale, *_rest(captured)]
    return (
        Window(captured.sliding_window, captured.is_chunked),
        settings,
        attention_over,
        cached_attention,
    )


def _extended(
    program: Program, region: Region, buffer: fx.Node, slots: fx.Node, states: Any
) -> fx.Node:
    """Add the keys or values of the new tokens to those of a layer."""
    node = program.call(extended, buffer, slots, states, before=region.attention)
    node.meta["val"] = buffer.meta["val"]
    node.meta["nn_module_stack"] = region.attention.meta.get("nn_module_stack")
    region.nodes.insert(region.nodes.index(region.attention), node)
    return node


def _mask_input(program: Program, region: Region, name: str, window: Window) -> fx.Node:
    """Declare the mask of a layer: one for all layers of a length, but where heads see different tokens in a window."""
    heads: str | int = 1
    if window.columns is not None and program.plan.schedule.cut is not None:
        name, heads = program.plan.layers[region.layer].cache, region.kv_shape.heads
    spec = InputSpec(
        _mask_name(name, window),
        ("batch", heads, "tokens", f"filled_{program.plan.cached_like(region.layer)}"),
        torch.bool,
        _mask_of(name, window),
    )
    return program.add_input(spec)


def _rest(captured: CapturedArguments) -> list[Any]:
    """Return dropout, soft cap and sinks, as many of them as it takes to name those there are."""
    rest = [captured.dropout or None, captured.softcap, captured.sinks]
    while rest and rest[-1] is None:
        rest.pop()
    return [captured.dropout, *rest[1:]] if rest else []


def _buffers(
    program: Program, region: Region, length: str, *, static: bool = True
) -> tuple[fx.Node, fx.Node]:
    """Declare a layer's key buffer [B, G, length, d] and value buffer [B, G, length, e]."""
    layer, shape = region.layer, region.kv_shape
    dims = ("batch", shape.heads, length)
    keys = InputSpec(
        f"keys_{layer}",
        (*dims, shape.key_width),
        program.dtype,
        KVPart(layer, 0, layer),
        static=static,
    )
    values = InputSpec(
        f"values_{layer}",
        (*dims, shape.value_width),
        program.dtype,
        KVPart(layer, 1, layer),
        static=static,
    )
    return program.add_input(keys), program.add_input(values)


@cache
def _mask_of(segment: str, window: Window) -> Callable[[DecodeCall], Tensor]:
    """Return what fills a mask; one object for each, since all layers that read it declare it."""
    return lambda call: call.mask(segment, *window)


def _mask_name(segment: str, window: Window) -> str:
    if window.columns is None:
        return f"mask_{segment}"
    return f"mask_{segment}_{'chunk' if window.chunked else 'window'}_{window.columns}"
