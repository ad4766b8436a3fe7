"""Return the rows that are asked for, normalised; the rows nobody reads are not.

    all rows:       return norm(hidden), columns
    chosen columns: return norm(hidden[places of output_columns]), columns
    states:         return also what the first layer reads, and what all but the last give

Before:  %mul_21 = norm(%add_191) ; return %mul_21
After:   %take_tokens = take_tokens(%add_191, %find_columns) ; %mul_21 = norm(%take_tokens)
         return {"hidden": %mul_21, "columns_text": ..., "columns_inject_8": ..., ...}
"""

import torch
from torch import fx

from hidrop_fx.ops import tokens
from hidrop_fx.planning import Plan
from hidrop_fx.program.inputs import InputSpec
from hidrop_fx.program.outputs import columns_output, states_output
from hidrop_fx.program.pass_function import can_be_disabled
from hidrop_fx.program.program import PassResult, Program


@can_be_disabled(
    "every row is normalised and returned, not the wanted ones alone", {"chosen": False}
)
def head(program: Program, plan: Plan, *, chosen: bool = False, states: bool = False) -> PassResult:
    """Return the final norm of the rows that are asked for, and the columns of every segment.

    Args:
        chosen: return the rows at the input `output_columns` instead of all.
        states: return the hidden states between the layers too.
    """
    given = program.outputs
    hidden = given["hidden"]
    columns = {s.name: s.columns for s in program.segments if s.columns is not None}
    if chosen:
        last = program.segments[-1]
        state = program.regions[-1].live_out
        normed = _before(hidden)
        tail = [user for user in state.users if user in normed]
        before = min(tail)
        wanted = program.add_input(
            InputSpec(
                "output_columns",
                ("batch", "outputs"),
                torch.int64,
                lambda call: call.output_columns,
            )
        )
        places = program.call(tokens.find_columns, last.columns, wanted, before=before)
        rows = program.call(tokens.take_tokens, state, places, before=before)
        for user in tail:
            user.replace_input_with(state, rows)
    outputs = {**given, **{columns_output(k): v for k, v in columns.items()}}
    if states:
        outputs[states_output(0)] = program.regions[0].hidden
        between = program.regions[:-1]
        outputs |= {states_output(r.layer + 1): r.live_out for r in between}
    program.returns(outputs)
    program.remove_unused_inputs()
    return PassResult(matched=1)


def _before(node: fx.Node) -> set[fx.Node]:
    """Return a node and everything that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending += new
    return found
