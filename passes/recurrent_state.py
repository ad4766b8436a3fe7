"""Nodes that keep the states of recurrent layers behind a prompt, and go on from them in decode.

Before, in prefill:  %convolved = causal_convolution(%x, ...) ; %out = causal_recurrence(%q, %k, %v, ...)
After:               %inputs = last_inputs(%x, %columns, ...)
                     %run = prompt_recurrence(%q, %k, %v, ..., %columns, ...) ; %out, %state = %run[0], %run[1]

Before, in decode:   %convolution = hidrop.convolution(%x, ...) ; %recurrence = hidrop.recurrence(%q, %k, %v, ...)
After:               %convolved = cached_convolution_behind(%x, %keys_3, ...)
                     %out = cached_recurrence(%q, %k, %v, ..., %values_3, ...)

`kv_cache` declares the buffers and writes them, as it does for keys and values.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hidrop_fx.capture.regions import Region
from hidrop_fx.ops.convolution import ConvolutionArguments
from hidrop_fx.ops.recurrence import (
    cached_convolution_behind,
    convolution_behind,
    last_inputs,
)
from hidrop_fx.ops.recurrent_rules import rule_of
from hidrop_fx.passes.attention import replace_convolution, replace_recurrence
from hidrop_fx.program.inputs import InputSpec, KVPart
from hidrop_fx.program.program import Program

# One object each, since every recurrent layer declares them.
_ORDER = InputSpec("real_order", ("batch", "tokens"), torch.int64, lambda call: call.real_order)
_COUNTS = InputSpec("real_counts", ("batch",), torch.int64, lambda call: call.real_counts)


def state_buffers(
    program: Program, region: Region, *, static: bool = True
) -> tuple[fx.Node, fx.Node]:
    """Declare a layer's buffer of inputs [B, 1, K, C] and of its state [B, H, d, e], fp32."""
    shape, entry = region.state_shape, region.state_entry
    assert shape is not None
    assert entry is not None
    updated = static and program.kind == "decode"
    inputs = InputSpec(
        f"keys_{entry}",
        ("batch", 1, shape.kernel, shape.channels),
        program.dtype,
        KVPart(entry, 0, region.layer),
        static=static,
        updated=updated,
    )
    state = InputSpec(
        f"values_{entry}",
        ("batch", shape.heads, shape.rows, shape.columns),
        torch.float32,
        KVPart(entry, 1, region.layer),
        static=static,
        updated=updated,
    )
    return program.add_input(inputs), program.add_input(state)


def keep_state(program: Program, region: Region) -> None:
    """Let a layer hand on what it keeps behind a prompt."""
    shape, convolution = region.state_shape, region.convolution
    assert shape is not None
    assert convolution is not None
    segment = program.segment(program.plan.layers[region.layer].key)
    real = segment.columns, program.placeholder_named("column_is_vision")
    read = ConvolutionArguments.of(convolution).states
    inputs = _inside(program, region, last_inputs, read, *real, shape.kernel)
    old = _recurrence(region)
    run = _inside(program, region, rule_of(old).prompt, *old.args, *real)
    state = _inside(program, region, operator.getitem, run, 1)
    _note_shapes(program, region, inputs, state)
    replace_recurrence(region, program.call(operator.getitem, run, 0, before=old))


def go_on(program: Program, region: Region, *, masked: bool, differentiable: bool) -> None:
    """Run new tokens of a layer behind what it keeps.

    Args:
        masked: some of them may be padding.
        differentiable: hand on what it keeps then, and leave the buffers as they are.
    """
    buffers = state_buffers(program, region, static=not differentiable)
    assert region.convolution is not None
    told = [program.add_input(spec) for spec in (_ORDER, _COUNTS)] if masked else [None, None]
    read = ConvolutionArguments.of(region.convolution)
    convolved = (read.states, buffers[0], read.weight, read.bias, *told)
    old = _recurrence(region)
    run, rule = (*old.args, buffers[1], *told), rule_of(old)
    if not differentiable:
        new = program.call(cached_convolution_behind, *convolved, before=region.convolution)
        replace_convolution(region, new)
        replace_recurrence(region, program.call(rule.cached, *run, before=old))
        return
    at = region.convolution
    both = _inside(program, region, convolution_behind, *convolved, before=at)
    inputs = _inside(program, region, operator.getitem, both, 1, before=at)
    replace_convolution(region, program.call(operator.getitem, both, 0, before=at))
    both = _inside(program, region, rule.over, *run)
    state = _inside(program, region, operator.getitem, both, 1)
    _note_shapes(program, region, inputs, state)
    replace_recurrence(region, program.call(operator.getitem, both, 0, before=old))


def _recurrence(region: Region) -> fx.Node:
    assert region.recurrence is not None
    return region.recurrence


def _inside(
    program: Program,
    region: Region,
    function: Callable[..., Any],
    *args: Any,
    before: fx.Node | None = None,
) -> fx.Node:
    """Insert a node of a region, in front of its recurrence if nothing else is told."""
    at = _recurrence(region) if before is None else before
    node = program.call(function, *args, before=at)
    node.meta["nn_module_stack"] = at.meta.get("nn_module_stack")
    region.nodes.insert(region.nodes.index(at), node)
    return node


def _note_shapes(program: Program, region: Region, inputs: fx.Node, state: fx.Node) -> None:
    """Note what a layer keeps, with its sizes, which what reads it outside the layer is told."""
    shape = region.state_shape
    assert shape is not None
    with program.fake_mode:
        inputs.meta["val"] = torch.empty(
            (program.batch, 1, shape.kernel, shape.channels),
            dtype=program.dtype,
            device=program.device,
        )
        state.meta["val"] = torch.empty(
            (program.batch, shape.heads, shape.rows, shape.columns),
            dtype=torch.float32,
            device=program.device,
        )
    program.states[region.layer] = inputs, state
