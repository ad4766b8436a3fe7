"""Wait for the vision tower where its tokens enter, and not before.

Before:  %merge_tokens = merge_tokens(%add_41, %vision_embeds, %merge_index)
After:   %joined = joined(%vision_embeds)
         %merge_tokens = merge_tokens(%add_41, %joined, %merge_index)

The layers before the injection are launched meanwhile; on the device they run beside the tower.
"""

from contextvars import ContextVar

import torch
from torch import Tensor

from hidrop_fx.errors import PassError
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import PassResult, Program

SIDE_STREAM: ContextVar[torch.cuda.Stream | None] = ContextVar("side_stream", default=None)
"""The stream on which the vision tower runs in the call at hand."""


def overlap_vision(program: Program, plan: Plan) -> PassResult:
    """Insert the wait before the first node that reads vision tokens."""
    vision = program.placeholder_named("vision_embeds")
    users = sorted(vision.users)
    if not users:
        raise PassError("nothing reads the input vision_embeds; there is nothing to wait for")
    waited = program.call(joined, vision, before=users[0])
    for user in users:
        user.replace_input_with(vision, waited)
    return PassResult(matched=len(users), note=f"before layer {plan.of_kind('inject')[0].layer}")


def joined(vision: Tensor) -> Tensor:
    """Return the same tensor, safe to read on the current stream."""
    side = SIDE_STREAM.get()
    if side is not None:
        main = torch.cuda.current_stream(vision.device)
        main.wait_stream(side)
        vision.record_stream(main)
    return vision
