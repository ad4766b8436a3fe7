"""Packed batches of every class: each sample with what it has in a row of its own, by position ids and by bounds.

The padded batch, under the same schedule, is held against the reference in test_families.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.models import family_of
from tests.models.test_families import SCHEDULE, labelled, row_sets
from tests.support.families import CASES, Batch, Case, make_batch
from tests.support.packed import bounds, pack
from tests.support.runtimes import compiled_eagerly

DEFAULT = ("qwen2_5_vl", "gemma3")
"""Classes that the default run tries."""
each_class = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in DEFAULT else [pytest.mark.families])
        for name, case in CASES.items()
    ],
)


def packed(case: Case, batch: Batch) -> dict[str, Any]:
    """Return the batch packed, ids of the text before those of several axes."""
    found = pack(batch.inputs)
    if case.token_types is not None:
        real = batch.inputs["attention_mask"].bool()
        found[case.type_input] = batch.inputs[case.type_input][real][None]
    ids = torch.cat([row.position_ids for row in batch.rows], dim=-1)
    if ids.dim() == 2:
        return found | {"position_ids": torch.cat([found["position_ids"], ids])[:, None]}
    return found | {"position_ids": ids[None]}


def step(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(found: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert set(found[1]) == set(wanted[1])
    for name, gradient in wanted[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )  # fmt: skip


@each_class
def test_packed_samples_are_those_of_the_padded_batch(case: Case) -> None:
    model = case.make().train()
    for rows in row_sets(case):
        batch = make_batch(case, model, rows, "right")
        batch.inputs["labels"] = labelled(batch)
        given = packed(case, batch)
        by_bounds = pack(batch.inputs) | given | bounds(batch.inputs)
        del by_bounds["position_ids"]  # the class makes those of each sample
        with compiled_eagerly(model, SCHEDULE):
            wanted = step(model, batch.inputs)
            compare(step(model, given), wanted)
            compare(step(model, by_bounds), wanted)


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.families)]
)
def test_under_the_identity_several_axes_are_read_as_transformers_reads_them(name: str) -> None:
    case = CASES[name]
    model = case.make().train()
    batch = make_batch(case, model, row_sets(case)[0], "right")
    batch.inputs["labels"] = labelled(batch)
    given = packed(case, batch)
    wanted = step(model, given | {"use_cache": False})
    with compiled_eagerly(model, "identity"):
        compare(step(model, given), wanted)
        axes = family_of(model).axes
        for ids in (given["position_ids"][1:], given["position_ids"][0]):
            if len(ids) == axes:  # one sample, as to transformers
                assert abs(float(step(model, given | {"position_ids": ids})[0] - wanted[0])) > 1e-3
                continue
            with pytest.raises(
                hidrop.InputError, match=r"reads packed sequences off ids of the text"
            ):
                model(**given | {"position_ids": ids})
