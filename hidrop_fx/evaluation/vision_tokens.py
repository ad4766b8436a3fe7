"""The vision tokens that the layers of the last call ran on, row by row."""

from collections.abc import Mapping
from typing import Any

import torch

from hidrop_fx.inspection.report.row_costs import costs_of_rows
from hidrop_fx.models import family_of
from hidrop_fx.runtime.hf.binding import runtime_of


def executed_vision_tokens(model: Any, inputs: Mapping[str, Any]) -> list[float]:
    """Return for each row of the last call the vision tokens of a layer, on average over the layers.

    Of a model that is not compiled those of the prompt. Under beam search a row stands for its beams.

    Args:
        inputs: of that call, `input_ids` int64 [B, L] among them.
    """
    runtime = runtime_of(model)
    rows = inputs["input_ids"].shape[0]
    if runtime is None:
        places = torch.tensor(family_of(model).tokens(model.config))
        counts: list[float] = torch.isin(inputs["input_ids"].cpu(), places).sum(dim=1).tolist()
        return counts
    assert runtime.last_layout is not None
    costs = costs_of_rows(runtime.model, runtime.last_layout)
    return [row.average_vision_tokens for row in costs[:: len(costs) // rows]]
