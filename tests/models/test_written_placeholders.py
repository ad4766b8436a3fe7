"""A placeholder that the model writes itself is embedded as its class does it: forced upon `generate` as a second token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import hidrop_fx as hidrop
from tests.support.families import CASES, ROWS, make_batch
from tests.support.families.case import IMAGE_TOKEN
from tests.support.runtimes import compiled_eagerly


class Forced(LogitsProcessor):
    """The token of images at one step, the likeliest at others."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] != self.step:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, IMAGE_TOKEN] = 0
        return forced


@pytest.mark.families
@pytest.mark.parametrize("name", ["kimi_k25", "muse_glimmer", "muse_spark", "gemma4", "llava"])
@torch.no_grad()
def test_a_placeholder_among_the_new_tokens(name: str) -> None:
    case = CASES[name]
    model = case.make()
    inputs = make_batch(case, model, ROWS).inputs
    length = inputs["input_ids"].shape[1]

    def logits() -> Tensor:
        out: Any = model.generate(
            **dict(inputs), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
            logits_processor=[Forced(length + 1)], output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert (out.sequences[:, length + 1] == IMAGE_TOKEN).all()
        return torch.stack(out.logits)

    wanted = logits()
    with compiled_eagerly(model, hidrop.Schedule()):
        torch.testing.assert_close(logits(), wanted, atol=2e-4, rtol=2e-4)
