"""Add features of tower layers to the vision tokens that are there.

    hidden = hidden + additions_k[columns]          # zero rows for words

Before:  %add_59 = layers.2(%merge_tokens) ; %add_71 = layers.3(%add_59)
After:   %add_59 = layers.2(%merge_tokens)
         %add_columns = add_columns(%add_59, %additions_3, %columns)
         %add_71 = layers.3(%add_columns)

A dropped token has no row, and gets nothing. What a token missed that enters late is no matter of this pass: `inject` adds
it. Vision places that belong to the text stream (`deepstack_text`) are there from the first layer on.
"""

from functools import partial

from torch import Tensor, fx

from hidrop_fx.ops import tokens
from hidrop_fx.planning import Plan
from hidrop_fx.planning.deepstack import Deepstack
from hidrop_fx.program.inputs import InputSpec, PromptCall
from hidrop_fx.program.program import PassResult, Program


def deepstack_text(program: Program, plan: Plan) -> PassResult:
    """Add the features of the vision places in the text stream, before vision tokens enter."""
    layers = [k for k in _given(program).layers if k <= plan.schedule.inject]
    columns = program.segments[0].columns
    for layer in layers:
        region = program.regions[layer]
        table = _table(program, layer)
        hidden = program.call(
            tokens.add_columns, region.hidden, table, columns, before=region.nodes[0]
        )
        region.read(region.hidden, hidden)
        region.hidden = hidden
    return PassResult(matched=len(layers), note=_note(layers))


def deepstack(program: Program, plan: Plan, *, text: bool = False) -> PassResult:
    """Add features behind the injection, wherever vision tokens are left.

    Args:
        text: the text stream holds vision places, which do not leave.
    """
    exit_ = len(program.regions) if plan.schedule.exit is None else plan.schedule.exit
    wanted = _given(program).after_entering(plan.schedule)
    layers = [k for k in wanted if k <= exit_ or text]
    for layer in layers:
        _add_at(program, layer)
    return PassResult(matched=len(layers), note=_note(layers))


def _add_at(program: Program, layer: int) -> None:
    """Add features behind the layer before, so that what happens at this layer's input finds them there."""
    out, segment = program.regions[layer - 1].live_out, program.segment_of(layer - 1)
    table, users = _table(program, layer), list(out.users)
    new = program.call(tokens.add_columns, out, table, segment.columns, before=min(users))
    for user in users:
        user.replace_input_with(out, new)
    for region in program.regions:
        if region.hidden is out:
            region.hidden = new


def _given(program: Program) -> Deepstack:
    found = program.captured.deepstack
    assert found is not None
    return found


def _table(program: Program, layer: int) -> fx.Node:
    dims = ("batch", "columns", program.width)
    fill = partial(_additions, layer=layer)
    return program.add_input(InputSpec(f"additions_{layer}", dims, program.dtype, fill))


def _additions(call: PromptCall, layer: int) -> Tensor:
    return call.additions(layer)


def _note(layers: list[int]) -> str:
    if not layers:
        return "no vision token is there where features are added"
    return f"at the input of layer {', '.join(map(str, layers))}"
