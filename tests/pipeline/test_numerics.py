"""Finished programs compute what the layers compute in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hidrop_fx import Schedule
from tests.support.captured import FULL, HEAD, WIDTH, CapturedModel
from tests.support.programs import ROWS, filled, kv_buffers, layout_and_tensors, run


def loop(
    decoder: Any, schedule: Schedule, embeds: Tensor, vision: list[int]
) -> tuple[Tensor, list[int]]:
    """The schedule, one sample, layer by layer; hidden states and columns of the last segment."""
    length = len(embeds)
    ids = torch.arange(length)
    if schedule.positions == "group":
        ids = ids - torch.tensor(
            [0 if c in vision else sum(v < c for v in vision) for c in range(length)]
        )
    hidden, columns, alive = embeds, list(range(length)), list(vision)
    for k, layer in enumerate(decoder.layers):
        before = columns
        if k == schedule.inject:
            old, hidden, columns = (
                dict(zip(columns, hidden, strict=True)),
                embeds,
                list(range(length)),
            )
            if k:
                hidden = torch.stack([old.get(c, embeds[c]) for c in columns])
        elif k == 0:
            columns = [c for c in columns if c not in vision]
            hidden = embeds[columns]
        if k in schedule.prune:
            scores = last_row(decoder, layer, hidden, ids[columns])
            by_score = sorted(alive, key=lambda c: (-scores[columns.index(c)], c))
            alive = sorted(by_score[: schedule.keep_counts(len(vision))[k]])
        if k == schedule.exit:
            alive = []
        if k in schedule.prune or k == schedule.exit:
            before, columns = columns, [c for c in columns if c not in vision or c in alive]
            hidden = hidden[[before.index(c) for c in columns]]
            if schedule.positions == "compact":
                ids = ids.clone()
                ids[columns] = torch.arange(len(columns))
        rope = decoder.rotary_emb(hidden[None], ids[columns][None])
        hidden = layer(hidden[None], position_embeddings=rope, attention_mask=None)[0]
    return decoder.norm(hidden), columns


def last_row(decoder: Any, layer: Any, hidden: Tensor, ids: Tensor) -> list[float]:
    """Mean over heads of the last token's attention."""
    normed, attention = layer.input_layernorm(hidden[None]), layer.self_attn
    query, key = (
        project(normed).view(1, len(hidden), -1, HEAD).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(hidden[None], ids[None]))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    weights = (query[:, :, -1:] @ key.transpose(2, 3) * attention.scaling).softmax(dim=-1)
    return list(weights.mean(dim=1)[0, 0].tolist())


@pytest.mark.parametrize("positions", ["persistent", "compact", "group"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inject": 2},
        {"prune": {0: 3, 2: 1}},
        {"inject": 1, "prune": {1: 4, 2: 2}, "exit": 3},
        {"inject": 3, "exit": 4},
    ],
    ids=["identity", "inject", "prune", "all", "late"],
)
def test_a_train_program_equals_the_layers_in_a_loop(
    llama: CapturedModel, options: dict[str, Any], positions: str
) -> None:
    schedule = Schedule(**options, positions=positions)
    program = llama.finished(**options, positions=positions)
    embeds = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    _, tensors = layout_and_tensors(schedule, ROWS, embeds)
    outputs = run(program, tensors)
    for b, row in enumerate(ROWS):
        start = len(row) - len(row.lstrip("."))
        vision = [i - start for i, c in enumerate(row) if c == "v"]
        with torch.no_grad():
            hidden, columns = loop(llama.model.get_decoder(), schedule, embeds[b, start:], vision)
        found = outputs[f"columns_{program.segments[-1].name}"][b].tolist()
        assert found[: len(columns)] == [c + start for c in columns]
        assert set(found[len(columns) :]) <= {len(row)}
        torch.testing.assert_close(
            outputs["hidden"][b, : len(columns)], hidden, rtol=1e-4, atol=1e-4
        )


def test_prefill_returns_the_chosen_rows_of_train(llama: CapturedModel) -> None:
    schedule = Schedule(**FULL)
    train, prefill = llama.finished(**FULL), llama.finished("prefill", "chosen", **FULL)
    embeds = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(1))
    layout, tensors = layout_and_tensors(schedule, ROWS, embeds)
    cache = kv_buffers(layout, prefill, 2, 0)
    all_rows = run(train, tensors)
    chosen = run(prefill, tensors | cache)
    assert chosen["hidden"].shape == (2, 1, WIDTH)
    for b in range(2):
        place = all_rows["columns_exit_3"][b].tolist().index(layout.last[b])
        torch.testing.assert_close(chosen["hidden"][b, 0], all_rows["hidden"][b, place])
    assert all(buffer.abs().sum() > 0 for buffer in cache.values())


def test_decode_after_prefill_equals_the_decoder_on_the_longer_row(llama: CapturedModel) -> None:
    schedule = Schedule()
    prefill, decode = llama.finished("prefill"), llama.finished("decode")
    embeds = torch.randn(1, 11, WIDTH, generator=torch.Generator().manual_seed(1))
    layout, tensors = layout_and_tensors(schedule, ["ttvvvvvttt"], embeds[:, :10])
    cache = kv_buffers(layout, prefill, 1, 1)
    run(prefill, tensors | filled(cache, layout, prefill, 0))
    inputs = filled(cache, layout, decode, 1) | {
        "inputs_embeds": embeds[:, 10:],
        "position_ids": torch.tensor([[10]]),
        "slots_inject_0": torch.tensor([10]),
    }
    hidden = run(decode, inputs)["hidden"]
    with torch.no_grad():
        expected = llama.model.get_decoder()(inputs_embeds=embeds).last_hidden_state[:, -1:]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
