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

The inputs `keys_3` are views of the filled part of a buffer: each layer of a rewritten decoder has
seen another number of tokens, and none reads or masks room that it does not use.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.errors import PassError
from hidrop_fx.ops.attention import (
    CapturedArguments,
    attention_over,
    cached_attention,
    extended,
)
from hidrop_fx.passes.attention import replace_attention
from hidrop_fx.planning import Plan
from hidrop_fx.program.inputs import DecodeCall, InputSpec
from hidrop_fx.program.outputs import keys_output, values_output
from hidrop_fx.program.pass_function import can_be_disabled
from hidrop_fx.program.program import PassResult, Program, SegmentNodes


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
        for segment in program.segments:
            _attend_over_buffers(program, segment, masked, differentiable)
    else:
        for region in program.regions:
            _write_buffers(program, region)
    if differentiable:
        program.returns(program.outputs | _cached(program))
    return PassResult(matched=len(program.regions))


def write_kv(buffer: Tensor, states: Tensor) -> None:
    """Fill a layer's buffer [B, G, S, d] in place."""
    buffer.copy_(states.detach())


def _write_buffers(program: Program, region: Region) -> None:
    _, key, value = region.attention.args[:3]
    after = min(user for user in region.live_out.users)
    keys, values = _buffers(program, region, _cached_segment(program, region))
    for buffer, node in ((keys, key), (values, value)):
        program.effects.add(program.call(write_kv, buffer, node, before=after))


def _cached(program: Program) -> dict[str, fx.Node]:
    """Return the outputs that hold the keys and values of each layer, as its attention reads them."""
    found: dict[str, Any] = {}
    for region in program.regions:
        _, keys, values = region.attention.args[:3]
        found |= {keys_output(region.layer): keys, values_output(region.layer): values}
    return found


def _attend_over_buffers(
    program: Program, segment: SegmentNodes, masked: bool, differentiable: bool
) -> None:
    regions = [r for r in program.regions if _cached_segment(program, r) == segment.name]
    if not regions:
        return
    name, filled = segment.name, f"filled_{segment.name}"
    slots = program.add_input(
        InputSpec(f"slots_{name}", ("tokens",), torch.int64, lambda call: call.slots(name))
    )
    masks = {}
    for window in dict.fromkeys(map(_window, regions)) if masked else ():
        spec = InputSpec(
            _mask_name(name, window),
            ("batch", 1, "tokens", filled),
            torch.bool,
            partial(_mask, segment=name, window=window),
        )
        masks[window] = program.add_input(spec)
    for region in regions:
        captured = CapturedArguments.of(region.attention)
        query, key, value = captured[:3]
        keys, values = _buffers(program, region, filled, static=not differentiable)
        how = [masks.get(captured.sliding_window), captured.scale, *_rest(captured)]
        call = partial(program.call, before=region.attention)
        if differentiable:
            read = [
                _extended(program, region, buffer, slots, states)
                for buffer, states in ((keys, key), (values, value))
            ]
            new = call(attention_over, query, *read, *how)
        else:
            new = call(cached_attention, query, key, value, keys, values, slots, *how)
        replace_attention(region, new)


def _extended(
    program: Program, region: Region, buffer: fx.Node, slots: fx.Node, states: Any
) -> fx.Node:
    """Add the keys or values of the new tokens to those of a layer."""
    node = program.call(extended, buffer, slots, states, before=region.attention)
    node.meta["val"] = buffer.meta["val"]
    node.meta["nn_module_stack"] = region.attention.meta.get("nn_module_stack")
    region.nodes.insert(region.nodes.index(region.attention), node)
    return node


def _cached_segment(program: Program, region: Region) -> str:
    """Name the segment whose tokens a layer caches.

    Raises:
        PassError: it is not the one whose keys the layer computes.
    """
    planned = program.plan.layers[region.layer]
    if planned.cache != planned.key:
        raise PassError(
            f"{region.path} is to cache the tokens of {planned.cache}, but computes the keys of "
            f"{planned.key}; no pass cuts a cache apart from its layer"
        )
    return planned.cache


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
        lambda c: c.keys(layer),
        static=static,
    )
    values = InputSpec(
        f"values_{layer}",
        (*dims, shape.value_width),
        program.dtype,
        lambda c: c.values(layer),
        static=static,
    )
    return program.add_input(keys), program.add_input(values)


def _mask(call: DecodeCall, segment: str, window: int | None) -> Tensor:
    return call.mask(segment, window)


def _mask_name(segment: str, window: int | None) -> str:
    return f"mask_{segment}" if window is None else f"mask_{segment}_window_{window}"


def _window(region: Region) -> int | None:
    return CapturedArguments.of(region.attention).sliding_window
