"""References that `compare` knows: which one fits a schedule, and transformers' own forward."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.capture.layers import base_of, layer_list, text_decoder
from hidrop_fx.capture.parallel_styles import check_undivided
from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.batch import Batch
from hidrop_fx.reference.rows import RowStates
from hidrop_fx.runtime.hf.binding import suspended
from hidrop_fx.runtime.runtime import Runtime

REFERENCES = ("auto", "loop", "transformers", "program")


def checked_reference(
    wanted: str, bound: Runtime, disable: Collection[str], *, training: bool
) -> str:
    """Return the reference to compare with, "auto" resolved.

    Args:
        wanted: one of `REFERENCES`.
        bound: runtime of the compiled model.
        disable: passes that are left out.
        training: labels are given.

    Raises:
        HidropError: no such reference, or it cannot tell what the schedule computes.
    """
    if wanted not in REFERENCES:
        raise HidropError(f"reference={wanted!r}; use one of {', '.join(REFERENCES)}")
    schedule = bound.schedule
    if schedule.prune and not schedule.scorer.deterministic:
        raise HidropError(
            f"score={schedule.score!r} draws other tokens in every run, so that no two can be compared; "
            "compile with another score to compare"
        )
    learned = training and schedule.learns
    own = [p.__name__ for p in bound.options.passes if p.__name__ not in disable]
    if wanted == "auto":
        if own or learned:
            return "program"
        wanted = "transformers" if schedule.identity and not training else "loop"
    if wanted == "transformers" and not schedule.identity:
        raise HidropError(
            f"reference='transformers' fits the identity schedule alone, and this one is {schedule}; "
            "use reference='loop'"
        )
    if wanted != "program" and learned:
        raise HidropError(
            f"reference={wanted!r} knows nothing of the ratios that selection={schedule.selection!r} "
            "learns; with labels use reference='program'"
        )
    found = "loop" if wanted == "transformers" and training else wanted
    if found == "loop":
        check_undivided(bound.model, "hidrop.compare with a plain loop")
    return found


@torch.no_grad()
def states_of_transformers(model: Any, inputs: Mapping[str, Any], batch: Batch) -> list[RowStates]:
    """Run the model as if it had never been compiled."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    decoder, found = text_decoder(model), {}

    def note_output(module: nn.Module, args: Any, out: Any) -> None:
        found["states"] = out.last_hidden_state

    hooks = [layer.register_forward_hook(note) for layer in layer_list(decoder)[1]]
    hooks.append(decoder.register_forward_hook(note_output))
    try:
        with suspended(model):
            base_of(model)(**{**inputs, "use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for row in range(batch.rows):
        columns = torch.cat([batch.row_columns(name, row) for name in ("text", "vision")])
        columns = columns.sort().values
        rows.append(
            RowStates(
                columns=[columns] * len(seen),
                hidden=[states[row][columns] for states in seen],
                output=found["states"][row][columns],
            )
        )
    return rows
