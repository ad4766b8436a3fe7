"""What `generate` of transformers before 5.23 does otherwise: it encodes images in the first forward.

For beams and several answers it has repeated them by then, each by itself: a, a, b, b for two rows of a and b.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf import generate
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support import families
from tests.support.models import IMAGE, PRUNED, Make, batch

ROWS: list[Any] = [[5, families.IMAGE, 6, families.IMAGE, 7], [8, 9], [4, families.IMAGE, 5]]
COPIES = 3


class Older(GenerationMixin):
    """A class whose generate has no step that encodes."""

    def __getattribute__(self, name: str) -> Any:
        if name == generate.PIXELS:
            raise AttributeError(name)
        return super().__getattribute__(name)


class OlderWithOwnOrder(Older):
    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Repeat rows with their images together, as Qwen2-VL does."""


@pytest.mark.parametrize(
    ("beams", "sequences", "copies"), [(2, 1, 2), (1, 3, 3), (2, 2, 2), (1, 1, 1), (None, None, 1)]
)
def test_images_are_repeated_where_rows_are(beams: Any, sequences: Any, copies: int) -> None:
    config = SimpleNamespace(num_beams=beams, num_return_sequences=sequences)
    assert generate._copies(Older(), config) == copies
    assert generate._copies(OlderWithOwnOrder(), config) == 1


def test_images_that_were_encoded_before_are_not_repeated(plain: Make) -> None:
    if not hasattr(plain(), generate.PIXELS):
        pytest.skip("this transformers has no step that encodes")
    assert generate._copies(plain(), SimpleNamespace(num_beams=2, num_return_sequences=1)) == 1


def test_a_model_without_a_step_that_encodes_keeps_its_pixels() -> None:
    given = {"pixel_values": torch.zeros(1, 3, 4, 4)}
    generate._encode_before(SimpleNamespace(), given)
    assert list(given) == ["pixel_values"]


def repeated(inputs: dict[str, Any]) -> dict[str, Any]:
    """Repeat every entry by itself, as `_expand_inputs_for_generation` does."""
    return {
        name: value.repeat_interleave(COPIES, dim=0) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def assert_copies_equal_their_rows(model: Any, inputs: dict[str, Any]) -> None:
    cache = HidropCache()
    cache.copies = COPIES
    once = model(**inputs).logits.repeat_interleave(COPIES, dim=0)
    found = model(**repeated(inputs), past_key_values=cache).logits
    real = inputs["attention_mask"].bool().repeat_interleave(COPIES, dim=0)
    torch.testing.assert_close(found[real], once[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_of_repeated_rows_stay_with_their_rows(compiled: Make) -> None:
    model = compiled("llama", PRUNED)
    rows = [[5, IMAGE, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5]]
    assert_copies_equal_their_rows(model, batch(model, rows))
    assert_copies_equal_their_rows(model, batch(model, [[3, 4, 5]]))


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "internvl", "llava_pixtral"])
@torch.no_grad()
def test_tiles_and_patches_of_repeated_rows_stay_with_their_rows(name: str) -> None:
    """Entries of the inputs are tiles, rows of the batch, or patches there."""
    case = families.CASES[name]
    model = case.make()
    inputs = families.make_batch(case, model, ROWS).inputs
    hidrop.compile(model, "inject=1,prune=1:3,exit=2", backend="eager")
    assert_copies_equal_their_rows(model, inputs)
