"""Configurations of public checkpoints and of classes' defaults, smaller in depth and width alone, under two schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from tests.support.families import CASES, ROWS, make_batch
from tests.support.families.checkpoints import CHECKPOINTS
from tests.support.families.defaults import NAMES, with_default_text
from tests.support.runtimes import compiled_eagerly

LAST = 8
"""Columns whose logits are looked at: vocabularies are as long as published."""

pytestmark = pytest.mark.usefixtures("one_capture_a_model")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_a_checkpoint_s_configuration(name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    first, second = checkpoint.filters
    schedule = hidrop.Schedule(inject=1, prune={first: 0.5, second: 0.25}, exit=second + 1)
    model = checkpoint.make()
    inputs = checkpoint.inputs(model)
    if model.config.get_text_config().rope_parameters.get("rope_type") == "dynamic":
        with pytest.raises(hidrop.UnsupportedModelError, match=r"up to 32768 positions.*'default'"):
            hidrop.compile(model, schedule, backend="eager")
        model = with_default_rope(model)
    real = inputs["attention_mask"][:, -LAST:].bool()
    wanted = model(**inputs, logits_to_keep=LAST).logits
    with compiled_eagerly(model, hidrop.Schedule()):
        found = model(**inputs, logits_to_keep=LAST).logits
    torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=2e-4)
    with compiled_eagerly(model, schedule):
        assert hidrop.compare(model, new_tokens=2, **inputs).ok


def with_default_rope(model: Any) -> Any:
    """As the message says; with Hugging Face's own logits unchanged."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.text_config.rope_parameters["rope_type"] = "default"
    config._attn_implementation = "eager"
    made = type(model)(config).eval()
    made.load_state_dict(model.state_dict())
    inputs: dict[str, Any] = {"input_ids": torch.arange(3, 40)[None]}
    torch.testing.assert_close(made(**inputs).logits, model(**inputs).logits)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_default_text_model_of_a_class(name: str) -> None:
    case = CASES[name]
    model = with_default_text(case)
    batch = make_batch(case, model, ROWS)
    real = batch.inputs["attention_mask"].bool()
    wanted = model(**batch.inputs).logits
    with compiled_eagerly(model, hidrop.Schedule()):
        found = model(**batch.inputs).logits
    torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=2e-4)
    with compiled_eagerly(model, hidrop.Schedule(inject=1, prune={1: 0.5}, exit=2)):
        assert hidrop.compare(model, new_tokens=2, **batch.inputs).ok
