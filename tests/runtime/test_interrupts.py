"""An interrupt anywhere in a call leaves model, caches and process as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hidrop_fx as hidrop
from tests.runtime.machine.surroundings import surroundings
from tests.runtime.machine.trouble import interrupted_in_product, no_memory
from tests.support import counter
from tests.support.models import IMAGE, PRUNED, Make, batch, tiny_llava
from tests.support.runtimes import graph_runner

NEXT = torch.tensor([[3], [4]])
STRIDE = 3


def interrupt_everywhere(call: Callable[[], Any]) -> int:
    """Interrupt a call at every third function of the product that it enters; return how often."""
    interrupts = 0
    while True:
        try:
            with interrupted_in_product(1 + STRIDE * interrupts):
                call()
        except KeyboardInterrupt:
            interrupts += 1
        else:
            return interrupts


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("graphs", [False, True])
@torch.no_grad()
def test_an_interrupted_call_leaves_everything_as_it_was(graphs: bool) -> None:
    model: Any = hidrop.compile(
        tiny_llava(num_layers=1), "prune=0:4", backend="eager", cuda_graphs=graphs
    )
    inputs = batch(model, [[5, 6, IMAGE, 7], [8, 9]])
    cache = model(**inputs).past_key_values
    fresh = copy.deepcopy(cache)
    prompt = model(**inputs).logits
    after = model(input_ids=NEXT, past_key_values=copy.deepcopy(fresh)).logits
    before = surroundings()
    with counter.expect(captures=0, programs=0):
        assert interrupt_everywhere(lambda: model(**inputs)) > 20
        length = cache.get_seq_length()
        calls = interrupt_everywhere(lambda: model(input_ids=NEXT, past_key_values=cache))
        assert calls > 20
        # As in transformers, the tokens stay where the head alone was interrupted.
        cache.crop(length - cache.get_seq_length())
        assert torch.equal(model(input_ids=NEXT, past_key_values=cache).logits, after)
        assert torch.equal(model(**inputs).logits, prompt)
    assert surroundings() == before


class FailingClone(TorchDispatchMode):
    """Raise torch's error of too little memory at the `after`th copy of a tensor."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("of the test")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def graphed() -> Any:
    model = tiny_llava(num_layers=2)
    return hidrop.compile(model, "prune=1:4", backend="eager", cuda_graphs=True)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@torch.no_grad()
def test_a_cache_that_could_not_grow_goes_on(compiled: Make, after: int) -> None:
    """The keys of a layer may have grown when there is no memory for its values."""
    model = compiled("llama", PRUNED)
    inputs = batch(model, [[5, 6, IMAGE, 7], [8, 9]])
    cache = model(**inputs).past_key_values
    model(input_ids=NEXT, past_key_values=cache)
    fresh = copy.deepcopy(cache)
    for layer in cache.layers:
        end = layer.filled + 1
        layer.keys, layer.values = layer.keys[:, :, :end], layer.values[:, :, :end]
    error = torch.OutOfMemoryError("of the test")
    with no_memory(error, after), pytest.raises(torch.OutOfMemoryError):
        model(input_ids=NEXT, past_key_values=cache)
    expected = model(input_ids=NEXT, past_key_values=fresh).logits
    assert torch.equal(model(input_ids=NEXT, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
@torch.no_grad()
def test_a_cache_that_could_not_leave_the_pool_is_not_overwritten(graphed: Any, after: int) -> None:
    inputs = batch(graphed, [[5, 6, IMAGE, 7], [8, 9]])
    other = batch(graphed, [[15, IMAGE, 16], [17, 18]])
    expected = graphed(input_ids=NEXT, past_key_values=graphed(**inputs).past_key_values).logits
    cache = graphed(**inputs).past_key_values
    runner = graph_runner(graphed)
    with pytest.raises(torch.OutOfMemoryError), FailingClone(after):
        runner.pool.release()
    graphed(**other)
    assert torch.equal(graphed(input_ids=NEXT, past_key_values=cache).logits, expected)
