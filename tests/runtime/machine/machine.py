"""One compiled model through its life: what is known of it, and what holds after every step.

A step changes the model, or calls it. Beside it stands a recipe, from which a fresh model is made for every answer: the
same changes, the same weights, never compiled. Its answers come from the eager reference of the schedule in force, or from
transformers where none is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.runtime.machine.answers import (
    CLOSENESS,
    Closeness,
    Prompted,
    Tail,
    assert_close,
)
from tests.runtime.machine.fresh_models import (
    Change,
    Recipe,
    assert_same_weights,
    base_of,
    weights_of,
)
from tests.runtime.machine.model_changes import Traits
from tests.runtime.machine.surroundings import surroundings
from tests.support.models import IMAGE, batch, tiny_llava

LAYERS, IMAGE_TOKENS = 2, 4
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    rows: tuple[tuple[int | str, ...], ...]
    padding: Literal["left", "right"] = "left"
    pad_to: int | None = None
    seed: int = 0

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """Return the batch, in the dtype of the model."""
        return batch(
            base_of(model), self.rows, padding=self.padding, pad_to=self.pad_to, seed=self.seed
        )


PROMPTS = (
    Prompt(((5, 6, IMAGE, 7, 8),)),
    Prompt(((3, 4, 5, 6),)),
    Prompt(((5, 6, IMAGE, 7), (8, 9))),
    Prompt(((4, IMAGE, 5, IMAGE, 7, 9), (8, IMAGE)), "right"),
    Prompt(((IMAGE, 12, 13, 14), (15, IMAGE, 16), (17, 18, 19)), "left", 14),
    Prompt(((8, 9, 10), (11, IMAGE, 12, 13)), "right", 12, seed=1),
)
prompts = st.sampled_from(PROMPTS)

Environment = Callable[[], AbstractContextManager[Any]]
ENVIRONMENTS: dict[str, Environment] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}
environments = st.sampled_from(("grad", "no_grad", "no_grad", "inference", "autocast"))

# Beginnings of messages that are no fault, each where a rule allows it.
OTHER_CACHE = (
    r"past_key_values was filled under another schedule, or before the model changed",
    r"past_key_values is a DynamicCache",
    r"a hidrop_fx cache cannot serve another model's layers",
)


@dataclass
class Kept:
    """A cache that is kept for later, and what the reference knows of it."""

    cache: Any
    tails: list[Tail]
    ids: Tensor
    mask: Tensor
    """Of all that the cache holds, [B, n]."""
    structure: int
    """Of the model, when the cache was filled."""
    dtype: torch.dtype
    doubtful: bool
    """A cut was too close to call: nothing can be said of its answers."""
    right: bool
    """Padded on the right."""


class Machine(RuleBasedStateMachine):
    """A model, its recipe, and what is expected of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: Any = None
        self.schedule: hidrop.Schedule | None = None
        self.options: dict[str, Any] = {}
        self.ratios: Tensor | None = None
        self.traits = Traits()
        self.kept: list[Kept] = []
        self.backward_failed = False
        """An embedding cannot be resized then, in torch and transformers themselves: the node that adds up its gradient
        stays, with the old size."""
        self.version = 0
        """Counts changes of any kind, weights included."""
        self.structure = 0
        """Counts changes behind which a cache may be refused."""
        self.training = False
        self._fresh: tuple[int, Any] | None = None
        self._prompted: dict[tuple[Prompt, int], Prompted] = {}
        self._answers: dict[Any, Tensor] = {}

    def start(self, backbone: str) -> None:
        """Begin with a model of random weights."""
        window = {"llama": None, "qwen2": 5, "mistral": 6}[backbone]
        self.model = tiny_llava(
            backbone,
            num_layers=LAYERS,
            image_tokens=IMAGE_TOKENS,
            hidden_size=16,
            heads=2,
            sliding_window=window,
        )
        self.recipe = Recipe(copy.deepcopy(self.model.config))
        self.weights = weights_of(self.model)
        self.surroundings = surroundings()

    # What is known.

    @property
    def base(self) -> Any:
        return base_of(self.model)

    @property
    def compiled(self) -> bool:
        return self.schedule is not None

    @property
    def closeness(self) -> Closeness:
        return CLOSENESS[self.traits.dtype]

    @property
    def graphed(self) -> bool:
        return bool(self.options.get("cuda_graphs"))

    @property
    def trainable(self) -> bool:
        """True if there is a gradient, and one that can be compared."""
        idle = bool(self.traits.adapters) and (self.traits.merged or self.traits.disabled)
        return not idle and self.traits.dtype is not torch.bfloat16

    def fresh(self) -> Any:
        """Return a model made by the recipe with the weights of now, in the same mode; shared until something changes."""
        if self._fresh is None or self._fresh[0] != self.version:
            self._fresh = self.version, self.recipe.model(self.weights)
        model = self._fresh[1].train(self.training)
        model.zero_grad(set_to_none=True)
        return model

    def learned(self) -> dict[int, float] | None:
        """Return the ratios by filter layer, where the schedule learns them."""
        if self.ratios is None:
            return None
        assert self.schedule is not None
        return dict(zip(self.schedule.prune, self.ratios.tolist(), strict=True))

    def prompted(self, prompt: Prompt) -> Prompted:
        """Return what the reference makes of a prompt now."""
        key = (prompt, self.version)
        if key not in self._prompted:
            model = base_of(self.fresh())
            inputs = prompt.inputs(model)
            self._prompted[key] = Prompted(model, self.schedule, inputs, self.learned())
        return self._prompted[key]

    # What a step does.

    def attempt(self, call: Callable[[], T], *allowed: str) -> T | None:
        """Return the answer of a call; None where it is refused with one of the messages that are allowed."""
        try:
            return call()
        except hidrop.HidropError as error:
            if not any(re.match(start, str(error)) for start in allowed):
                raise
            note(f"refused: {str(error)[:60]}")
            return None

    def note_change(self, *, structure: bool = True) -> None:
        """Count a change; what was remembered of the model before it is forgotten."""
        self.version += 1
        self.structure += structure
        self._prompted.clear()
        self._answers.clear()

    def change(self, change: Change, **traits: Any) -> None:
        """Make a change of the model, and hold its weights against those of a fresh one that was changed so."""
        fresh = self.recipe.model(self.weights).train(self.training)
        made = []
        for model in (self.model, fresh):
            torch.manual_seed(1)  # new weights are drawn
            made.append(change(model))
        self.model = made[0]
        self.recipe.changes.append(change)
        self.weights = weights_of(self.model)
        assert_same_weights(self.weights, weights_of(made[1]), "weights after a change")
        self.traits = replace(self.traits, **traits)
        self.note_change()

    def adopt(self, model: Any) -> None:
        """Go on with another model that has the same weights."""
        self.model = model
        self.kept.clear()
        self.note_change()

    def set_schedule(self, schedule: hidrop.Schedule | None, options: dict[str, Any]) -> None:
        """Note what the model was compiled under; None if it was restored."""
        learns = schedule is not None and schedule.learns
        if not (learns and schedule == self.schedule):
            self.ratios = self.base.hidrop_ratios.values.detach().clone() if learns else None
        self.schedule, self.options = schedule, options
        self.note_change()

    # What is compared.

    def agree(self, found: Tensor, expected: Tensor, what: str, loose: bool = False) -> None:
        """Assert that logits are as close as the dtype lets them be."""
        closeness = CLOSENESS[torch.bfloat16] if loose else self.closeness
        assert_close(found.detach().to(expected.dtype), expected, closeness, what)

    def agree_with_before(self, key: Any, found: Tensor) -> None:
        """Assert that equal calls of an unchanged model give equal answers, bit by bit."""
        if self.graphed:  # a call that finds the buffers taken runs without padding
            return
        before = self._answers.setdefault((key, self.version), found.detach().clone())
        assert torch.equal(before, found), f"{key}: another answer than before"

    def keep(self, kept: Kept) -> None:
        """Keep a cache, and at most three."""
        if isinstance(kept.cache, HidropCache):
            assert kept.cache.get_seq_length() == kept.ids.shape[1], "length of the cache"
            self.kept = [*self.kept[-2:], kept]

    # What holds after every step.

    @invariant()
    def nothing_around_has_changed(self) -> None:
        if self.model is None:
            return
        now = surroundings()
        changed = {k: (v, now[k]) for k, v in self.surroundings.items() if now[k] != v}
        assert not changed, f"left changed: {changed}"
        implementation = self.base.config.text_config._attn_implementation
        assert implementation == "sdpa", f"attention implementation {implementation}"

    @invariant()
    def the_model_is_as_expected(self) -> None:
        if self.model is None:
            return
        assert hidrop.is_compiled(self.model) == self.compiled
        assert hidrop.is_compiled(self.base) == self.compiled
        assert self.model.training == self.training
        assert_same_weights(weights_of(self.model), self.weights, "weights after the step")
        if not self.compiled:
            assert "forward" not in self.base.__dict__
            assert not any("hidrop" in name for name in self.base.__dict__)
        ratios = getattr(self.base, "hidrop_ratios", None)
        assert (ratios is None) == (self.ratios is None)
        if ratios is not None and self.ratios is not None:
            assert torch.equal(ratios.values.detach(), self.ratios), "learned ratios"
