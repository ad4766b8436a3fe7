"""What a program of a later turn reads of the cache: the inputs that hold the past, and attention over it.

    mask = seen_behind(columns, shown)                               # once a segment
    out  = attention_behind(q, k, v, past_keys, past_values, mask, ...)

Before:  %attention = hidrop.attention(%q, %k, %v, ...)
After:   %mask = seen_behind(%columns, %past_shown_prune_3)
         %attention_behind = attention_behind(%q, %k, %v, %past_keys_3, %past_values_3, %mask, ...)

The keys and values of the turn itself stay the second and third argument: `kv_cache` writes these, and no others, to
the places behind the past.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.errors import PassError
from hidrop_fx.ops.attention import CapturedArguments
from hidrop_fx.ops.behind import attention_behind, seen_behind
from hidrop_fx.passes.attention import replace_attention
from hidrop_fx.planning import Plan
from hidrop_fx.program.inputs import InputSpec, PromptCall
from hidrop_fx.program.program import PassResult, Program


@dataclass(frozen=True, slots=True)
class PastPart:
    """What fills an input with a layer's keys or values of earlier turns."""

    layer: int
    part: Literal[0, 1]
    """0 for keys, 1 for values."""

    def __call__(self, call: PromptCall) -> Tensor:
        """Return them, [B, G, P, d]."""
        return call.past.buffers[self.layer][self.part]


def attention_over_past(program: Program, plan: Plan) -> PassResult:
    """Let every layer of a later turn attend to what its cache holds, and to the turn's own tokens before each."""
    masks: dict[tuple[str, str], fx.Node] = {}
    for region in program.regions:
        if not region.attends or region.keeps_state:
            raise PassError(
                f"{region.path} does not attend, and keeps no tokens that a later turn's could see"
            )
        captured, segment = CapturedArguments.of(region.attention), program.segment_of(region.layer)
        key = segment.name, plan.cached_like(region.layer)
        if key not in masks:
            assert segment.columns is not None
            shown = past_shown(program, region)
            masks[key] = program.call(seen_behind, segment.columns, shown, before=region.nodes[0])
        rest = [captured.scale, captured.dropout, captured.softcap, captured.sinks]
        given = (*captured[:3], *(past_input(program, region, part) for part in (0, 1)))
        new = program.call(attention_behind, *given, masks[key], *rest, before=region.attention)
        replace_attention(region, new)
    return PassResult(matched=len(program.regions))


def past_shown(program: Program, region: Region) -> fx.Node:
    """Declare which tokens of a layer's cache may be seen, bool [B, P]."""
    name = program.plan.cached_like(region.layer)
    dims = ("batch", f"past_{name}")
    return program.add_input(InputSpec(f"past_shown_{name}", dims, torch.bool, _shown(name)))


def past_input(program: Program, region: Region, part: Literal[0, 1]) -> fx.Node:
    """Declare keys or values [B, G, P, d] that a layer's cache holds."""
    layer, shape = region.layer, region.kv_shape
    width = (shape.key_width, shape.value_width)[part]
    dims = ("batch", shape.heads, f"past_{program.plan.cached_like(layer)}", width)
    name = f"past_{('keys', 'values')[part]}_{layer}"
    return program.add_input(InputSpec(name, dims, program.dtype, PastPart(layer, part)))


@cache
def _shown(name: str) -> Callable[[PromptCall], Tensor]:
    """Return what fills the input; one object for each name, since a mask and scores declare it."""
    return lambda call: call.past.shown[name]
