"""Inputs of programs that run outside a model."""

from __future__ import annotations

import torch
from torch import Tensor

from hidrop_fx import Plan, Schedule
from hidrop_fx.ops.tokens import take_tokens
from hidrop_fx.planning.batch_layout import Layout, lay_out
from hidrop_fx.program.program import Program
from tests.support.captured import HEAD, KV_HEADS, LAYERS

ROWS = ["ttvvvvvttt", "..tvvvvvtt"]


def layout_and_tensors(
    schedule: Schedule, rows: list[str], embeds: Tensor
) -> tuple[Layout, dict[str, Tensor]]:
    """Lay out rows of "t", "v" and "."; return the program inputs of train and prefill with it."""
    valid = torch.tensor([[c != "." for c in row] for row in rows])
    first = torch.tensor([row.index("t") if row[0] != "v" else 0 for row in rows])
    layout = lay_out(
        Plan.of(schedule, LAYERS),
        valid=valid,
        placeholder=torch.tensor([[c == "v" for c in row] for row in rows]),
        position_ids=(torch.arange(len(rows[0]))[None] - first[:, None]).clamp(min=0),
        images=[1] * len(rows),
    )
    return layout, prompt_inputs(layout, embeds)


def layout_inputs(layout: Layout) -> dict[str, Tensor]:
    """Inputs that follow from the layout alone, under the names that the built-in passes declare."""
    found = {
        "text_columns": layout.text_columns,
        "vision_columns": layout.vision_columns,
        "column_position_ids": layout.position_ids,
        "column_is_vision": layout.is_vision,
        "query_columns": layout.query_columns,
        "output_columns": layout.output_columns,
    }
    for event in layout.plan.events:
        found[f"slots_{event.name}"] = torch.arange(layout.lengths[event.name])
        if event.kind == "prune":
            found[f"keep_{event.layer}"] = torch.tensor(layout.vision_counts[event.name])
    return found


def prompt_inputs(layout: Layout, embeds: Tensor) -> dict[str, Tensor]:
    """All inputs of train and prefill, KV buffers aside.

    Args:
        embeds: of every column [B, L, D], or with one row more for the sentinel.
    """
    tensors = layout_inputs(layout)
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, layout.columns + 1 - embeds.shape[1]))
    for name in ("text", "vision"):
        tensors[f"{name}_embeds"] = take_tokens(padded, tensors[f"{name}_columns"])
    return tensors


def run(program: Program, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a program node by node, without gradients."""
    with torch.no_grad():
        outputs: dict[str, Tensor] = program.module(*[tensors[name] for name in program.inputs])
    return outputs


def kv_buffers(layout: Layout, program: Program, batch: int, room: int) -> dict[str, Tensor]:
    """Make zeros for every layer's keys and values, with room for more tokens."""
    return {
        f"{name}_{k}": torch.zeros(
            batch, KV_HEADS, layout.lengths[program.segment_of(k).name] + room, HEAD
        )
        for k in range(LAYERS)
        for name in ("keys", "values")
    }


def filled(
    buffers: dict[str, Tensor], layout: Layout, program: Program, fresh: int
) -> dict[str, Tensor]:
    """Cut buffers to the prompt and `fresh` tokens more, as a program takes them."""
    return {
        name: buffer[
            :, :, : layout.lengths[program.segment_of(int(name.split("_")[1])).name] + fresh
        ]
        for name, buffer in buffers.items()
    }
