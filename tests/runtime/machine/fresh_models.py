"""Fresh models: made from a config, changed as the model under test was, given its weights.

recipe = Recipe(config)
recipe.changes.append(with_lora)        # a function of a model that returns the model to go on with
model = recipe.model(weights)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.support.models import BOS, EOS, PAD

Change = Callable[[Any], Any]
Weights = dict[str, Tensor]


@dataclass
class Recipe:
    """How a model came to be what it is, values of its weights aside."""

    config: Any
    changes: list[Change] = field(default_factory=list)

    def model(self, weights: Weights) -> Any:
        """Make a model, plain or of PEFT, in eval mode; the caller's random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            model: Any = LlavaForConditionalGeneration(copy.deepcopy(self.config)).eval()
            generation = model.generation_config
            generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = (
                PAD,
                BOS,
                EOS,
            )
            for change in self.changes:
                model = change(model)
        base_of(model).load_state_dict(weights)
        return model


def base_of(model: Any) -> Any:
    """Return the transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def weights_of(model: Any) -> Weights:
    """Return copies of all weights."""
    return {k: v.detach().clone() for k, v in base_of(model).state_dict().items()}


def assert_same_weights(found: Weights, expected: Weights, what: str) -> None:
    """Assert equal names and values, bit by bit."""
    assert found.keys() == expected.keys(), (
        f"{what}: {sorted(found.keys() ^ expected.keys())} are not in both"
    )
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, f"{what}: dtype of {name}"
        assert torch.equal(found[name], value), f"{what}: values of {name}"
