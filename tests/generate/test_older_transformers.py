"""What `generate` of transformers before 5.23 does otherwise: it encodes images in the first forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hidrop_fx.errors import InputError
from hidrop_fx.runtime.hf import generate
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support.models import IMAGE, PRUNED, Make, batch


@pytest.mark.parametrize(
    ("beams", "sequences", "repeats"),
    [(2, 1, True), (1, 3, True), (1, 1, False), (None, None, False)],
)
def test_images_are_repeated_where_rows_are(beams: Any, sequences: Any, repeats: bool) -> None:
    config = SimpleNamespace(num_beams=beams, num_return_sequences=sequences)
    assert generate._repeats_images(SimpleNamespace(), config) is repeats


def test_a_model_without_a_step_that_encodes_keeps_its_pixels() -> None:
    given = {"pixel_values": torch.zeros(1, 3, 4, 4)}
    generate._encode_before(SimpleNamespace(), given)
    assert list(given) == ["pixel_values"]


@torch.no_grad()
def test_several_images_in_a_repeated_row_are_refused(compiled: Make) -> None:
    """They would come in another order than the rows."""
    model = compiled("llama", PRUNED)
    cache = HidropCache()
    cache.repeats_images = True
    with pytest.raises(InputError, match=r"a row has 2 images.*transformers 5\.23"):
        model(**batch(model, [[5, IMAGE, 6, IMAGE, 7]]), past_key_values=cache)
    model(**batch(model, [[5, IMAGE, 6]]), past_key_values=cache)
    assert cache.get_seq_length() > 0
