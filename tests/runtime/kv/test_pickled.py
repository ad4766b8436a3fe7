"""Caches and outputs of a compiled model are copied and pickled as transformers' are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from tests.support.models import PRUNED, Make, batch, tiny_llava
from tests.support.prompts import CLOSE, ROWS
from tests.support.ratios import supervised_batch, trained

TOKENS = torch.tensor([[3], [4], [5], [6]])


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@each_copy
@pytest.mark.parametrize("graphs", [False, True])
@torch.no_grad()
def test_a_copied_cache_is_a_prefix_of_its_own(copied: Callable[[Any], Any], graphs: bool) -> None:
    """Also of a cache whose buffers lie in the pool of recorded graphs."""
    model = hidrop.compile(tiny_llava(), PRUNED, backend="eager", cuda_graphs=graphs)
    cache = model(**batch(model, ROWS), use_cache=True).past_key_values
    twin = copied(cache)
    length = cache.get_seq_length()
    expected = [model(input_ids=TOKENS, past_key_values=cache).logits for _ in range(2)]
    assert (twin.get_seq_length(), cache.get_seq_length()) == (length, length + 2)
    for step in expected:
        found = model(input_ids=TOKENS, past_key_values=twin).logits
        torch.testing.assert_close(found, step, **CLOSE)


@torch.no_grad()
def test_a_pickled_cache_goes_on_with_another_copy_of_the_model_under_its_schedule(
    fresh: Make,
) -> None:
    model, other = fresh(), fresh()
    cache = model(**batch(model, ROWS), use_cache=True).past_key_values
    pickled = pickle.dumps(cache)
    expected = model(input_ids=TOKENS, past_key_values=cache).logits
    found = other(input_ids=TOKENS, past_key_values=pickle.loads(pickled)).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    hidrop.compile(other, "exit=2", backend="eager")
    with pytest.raises(hidrop.CacheError, match=r"pickled under another schedule"):
        other(input_ids=TOKENS, past_key_values=pickle.loads(pickled))
    with pytest.raises(hidrop.CacheError, match=r"or is another model's"):
        fresh(kv_heads=2)(input_ids=TOKENS, past_key_values=pickle.loads(pickled))


@torch.no_grad()
def test_a_shallow_copy_of_a_cache_is_the_cache(compiled: Make) -> None:
    """As of transformers' DynamicCache: its layers are shared."""
    model = compiled()
    cache = model(**batch(model, ROWS), use_cache=True).past_key_values
    twin = copy.copy(cache)
    model(input_ids=TOKENS, past_key_values=twin)
    assert cache.get_seq_length() == twin.get_seq_length()
    assert cache.layers[0] is twin.layers[0]
    cache.reset()
    assert twin.get_seq_length() == 0
    again = model(**batch(model, ROWS), past_key_values=twin)
    torch.testing.assert_close(again.logits, model(**batch(model, ROWS)).logits)


@pytest.mark.parametrize("copied", [copy.copy, *COPIES.values()], ids=["copy", *COPIES])
def test_outputs_come_back_with_all_that_they_hold(copied: Callable[[Any], Any]) -> None:
    model = trained()
    inputs = supervised_batch(model)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    twin = copied(output)
    assert type(twin) is type(output)
    assert twin.keys() == output.keys()
    assert torch.equal(twin.logits, output.logits)
    assert torch.equal(twin.logit_columns, output.logit_columns)
    assert all(map(torch.equal, twin.hidden_states, output.hidden_states))
    with torch.no_grad():
        kept = model.eval()(**batch(model, ROWS), use_cache=True)
    model.train()
    assert copied(kept).past_key_values.get_seq_length() == kept.past_key_values.get_seq_length()
