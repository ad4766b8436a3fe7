"""KV memory that one request leaves to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, PRUNED, batch, tiny_llava
from tests.support.runtimes import graph_runner

NEW = 12
ROWS = [[5, 6, IMAGE, 7]]
POISON = [float("nan"), float("inf")]


@pytest.fixture(scope="module")
def graphed() -> Any:
    return hidrop.compile(
        tiny_llava("qwen2"), PRUNED, backend="eager", cuda_graphs=True, bucket_multiple=8
    )


def poison(model: Any, value: float) -> None:
    """Leave keys and values of a request that overflowed in all of the pool."""
    for storage in graph_runner(model).pool._storage.values():
        storage.fill_(value)


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("rows", [ROWS, [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]])
def test_a_request_that_overflowed_leaves_the_next_one_alone(
    graphed: Any, value: float, rows: Any
) -> None:
    inputs = batch(graphed, rows)
    expected = new_tokens(graphed, inputs, NEW)
    poison(graphed, value)
    assert new_tokens(graphed, inputs, NEW) == expected


@pytest.mark.parametrize("value", POISON)
def test_a_cache_that_moves_back_in_finds_no_one_elses_tokens(graphed: Any, value: float) -> None:
    inputs = batch(graphed, ROWS)
    alone = steps(graphed, inputs, 6, lambda: None)
    other = batch(graphed, [[8, IMAGE, 9, 4, IMAGE]])

    def another() -> None:
        new_tokens(graphed, other, 2)
        poison(graphed, value)

    assert steps(graphed, inputs, 6, another) == alone


@pytest.mark.parametrize("value", POISON)
def test_a_draft_that_was_cropped_leaves_nothing(graphed: Any, value: float) -> None:
    """Rejected tokens lie behind the ones that stay, and may have overflowed themselves."""
    inputs = batch(graphed, ROWS)
    logits = []
    for overflows in (False, True):
        cache = HidropCache(max_length=40)
        with torch.no_grad():
            graphed(**inputs, past_key_values=cache)
            for token in (8, 9):
                graphed(input_ids=torch.tensor([[token]]), past_key_values=cache)
            cache.crop(-1)
            if overflows:
                for layer in cache.layers:
                    layer.keys[:, :, layer.filled] = value
                    layer.values[:, :, layer.filled] = value
            token = torch.tensor([[10]])
            graphed(input_ids=token, past_key_values=cache)
            logits.append(graphed(input_ids=token, past_key_values=cache).logits)
    assert torch.equal(*logits)


@torch.no_grad()
def steps(model: Any, inputs: dict[str, Tensor], count: int, between: Any) -> list[int]:
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    found = []
    for _ in range(count):
        token = output.logits[:, -1:].argmax(dim=-1)
        found.append(int(token))
        between()
        output = model(input_ids=token, past_key_values=output.past_key_values)
    return found
