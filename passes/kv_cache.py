"""Give every layer its own key/value buffer.

    prefill:  keys[layer][:, :, :S] = k ; values[layer][:, :, :S] = v
    decode:   keys[layer][:, :, slot] = k ; out = attention(q, keys[layer][:, :, :filled], ...)

Before, in prefill:  %causal_attention = causal_attention(%q, %k, %v, ...)
After:               %write = write_kv(%keys_3, %k) ; %write_1 = write_kv(%values_3, %v)
                     %causal_attention = causal_attention(%q, %k, %v, ...)

Before, in decode:   %attention = hidrop.attention(%q, %k, %v, ...)
After:               %cached = cached_attention(%q, %k, %v, %keys_3, %values_3, %slots_prune_3, ...)

The inputs `keys_3` are views of the filled part of a buffer: each layer of a rewritten decoder has
seen another number of tokens, and none reads or masks room that it does not use.
"""

from typing import Any

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.ops.attention import cached_attention
from hidrop_fx.passes.attention import replace_attention
from hidrop_fx.planning.plan import Plan
from hidrop_fx.program.program import PassResult, Program, SegmentNodes


def kv_cache(program: Program, plan: Plan, *, masked: bool = False) -> PassResult:
    """Args: masked: decode reads a mask per segment (rows of unequal length, sliding windows)."""
    if program.kind == "decode":
        for segment in program.segments:
            _attend_over_buffers(program, segment, masked)
    else:
        for region in program.regions:
            _write_buffers(program, region)
    return PassResult(matched=len(program.regions))


def write_kv(buffer: Tensor, states: Tensor) -> None:
    """Fill a layer's buffer [B, G, S, d] in place."""
    buffer.copy_(states.detach())


def _write_buffers(program: Program, region: Region) -> None:
    _, key, value = region.attention.args[:3]
    after = min(user for user in region.live_out.users)
    for name, node in (("keys", key), ("values", value)):
        assert isinstance(node, fx.Node)
        shape = _buffer_shape(program, region, program.segment_of(region.layer).length)
        buffer = program.add_input(f"{name}_{region.layer}", shape, program.dtype)
        program.effects.add(program.call(write_kv, buffer, node, before=after))


def _attend_over_buffers(program: Program, segment: SegmentNodes, masked: bool) -> None:
    regions = [r for r in program.regions if program.segment_of(r.layer) is segment]
    if not regions:
        return
    fresh = segment.length
    filled = program.new_length("filled")
    slots = program.add_input(f"slots_{segment.name}", (fresh,), torch.int64)
    mask_shape = (program.batch, 1, fresh, filled)
    windows = dict.fromkeys(_window(r) for r in regions) if masked else {}
    masks = {
        window: program.add_input(mask_name(segment.name, window), mask_shape, torch.bool)
        for window in windows
    }
    for region in regions:
        query, key, value, _, scale, *_ = region.attention.args
        shape = _buffer_shape(program, region, filled)
        keys = program.add_input(f"keys_{region.layer}", shape, program.dtype)
        values = program.add_input(f"values_{region.layer}", shape, program.dtype)
        mask = masks.get(_window(region))
        new = program.call(
            cached_attention,
            query, key, value, keys, values, slots, mask, scale,
            before=region.attention,
        )  # fmt: skip
        replace_attention(region, new)


def _buffer_shape(program: Program, region: Region, length: Any) -> tuple[Any, ...]:
    value = region.attention.args[2]  # as captured: values are never rotated or gathered
    assert isinstance(value, fx.Node)
    _, heads, _, width = value.meta["val"].shape
    return (program.batch, heads, length, width)


def mask_name(segment: str, window: int | None) -> str:
    """Name of the decode input that masks a segment's buffers."""
    return f"mask_{segment}" if window is None else f"mask_{segment}_window_{window}"


def _window(region: Region) -> int | None:
    window = region.attention.args[6]
    assert window is None or isinstance(window, int)
    return window
