"""Run a prepared call: through the graph runner, or its executable alone.

outputs = execute(prepared, graphs)         # the program's outputs by name
output = decoder_output(prepared, outputs)  # what the caller asked for; the cache takes note
"""

import torch
from torch import Tensor

from hidrop_fx.runtime.call_context import PromptContext
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.decode import decode_output
from hidrop_fx.runtime.output import DecoderOutput
from hidrop_fx.runtime.prepared_call import PreparedCall
from hidrop_fx.runtime.prompt_output import prompt_output
from hidrop_fx.surroundings import in_dispatch_mode


def run(prepared: PreparedCall, graphs: GraphRunner | None = None) -> DecoderOutput:
    """Run a prepared call and return hidden states, cache and image features."""
    return decoder_output(prepared, execute(prepared, graphs))


def execute(prepared: PreparedCall, graphs: GraphRunner | None = None) -> dict[str, Tensor]:
    """Run the program of a prepared call and return its outputs by name."""
    with torch.set_grad_enabled(prepared.grad):
        return _execute(prepared, graphs)


def decoder_output(prepared: PreparedCall, outputs: dict[str, Tensor]) -> DecoderOutput:
    """Turn a program's outputs into those of the call."""
    if isinstance(prepared.context, PromptContext):
        return prompt_output(prepared, prepared.context, outputs)
    return decode_output(prepared, prepared.context, outputs)


def _execute(prepared: PreparedCall, graphs: GraphRunner | None) -> dict[str, Tensor]:
    if graphs is not None and prepared.recorded:
        if not in_dispatch_mode():
            return graphs(prepared)
        graphs.log.note_dispatch_mode()  # a replay calls no operator that it could see
    return prepared.executable(prepared.tensors, recompute=prepared.recompute)
