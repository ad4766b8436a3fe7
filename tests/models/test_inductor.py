"""Generated code of each family's programs: prefill, decode and a training step equal the uncompiled programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from tests.models.test_families import generated, labelled
from tests.support.families import CASES, IMAGE, Batch, make_batch
from tests.support.runtimes import runtime_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_capture_a_model")]

NAMES = (
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "mistral3",
    "smolvlm",
    "lfm2_vl",
    "llama4",
    "qwen3_5",
)
SCHEDULE = hidrop.Schedule(inject=1, prune={1: 3}, exit=2)
ROWS: list[list[int | str]] = [[5, IMAGE, 6, 7, 8], [8, IMAGE, 9, 10, IMAGE, 11, 12]]


def outcome(model: Any, batch: Batch, labels: torch.Tensor, backend: str) -> dict[str, Any]:
    """What a backend makes of a prompt, of tokens behind it, and of a training step."""
    hidrop.compile(model, SCHEDULE, backend=backend)
    try:
        with torch.no_grad():
            found: dict[str, Any] = {"logits": model(**batch.inputs).logits[:, -1].clone()}
        found["tokens"] = generated(model, batch)
        model.train()
        loss = model(**batch.inputs, labels=labels).loss
        loss.backward()
        found["loss"] = loss.detach()
        found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found["fallbacks"] = list(runtime_in(model).programs.log.fallbacks)
    finally:
        hidrop.restore(model)
        model.zero_grad(set_to_none=True)
        model.eval()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_generated_code_computes_what_the_programs_say(name: str) -> None:
    case = CASES[name]
    model = case.make()
    batch = make_batch(case, model, ROWS, "left")
    labels = labelled(batch)
    expected = outcome(model, batch, labels, "eager")
    found = outcome(model, batch, labels, "inductor")
    assert found.keys() == expected.keys()
    assert found.pop("fallbacks") == []
    assert found.pop("tokens") == expected["tokens"]
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], atol=1e-3, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )
