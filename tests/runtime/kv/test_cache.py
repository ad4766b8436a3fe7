"""The cache that a compiled model returns: its memory, its lengths, and what one can do with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.kv.cache import HidropCache
from tests.support.models import IMAGE, PRUNED, Make, batch, tiny_llava
from tests.support.reference import Reference, split_batch

ROW: list[int | str] = [5, 6, IMAGE, 7, 8, 9]
EQUAL: list[list[int | str]] = [ROW, [4, IMAGE, 3, 9, 8, 20], [IMAGE, 4, 5, 6, 7, 8]]
RAGGED: list[list[int | str]] = [ROW, [8, IMAGE], [4, 5, 6, 7, 8], [IMAGE, 5, IMAGE, 12]]
SCHEDULES = [
    "identity",
    PRUNED,
    "inject=2,exit=4",
    "prune=0:0.5+3:2",
    PRUNED + ",positions=compact",
]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


pytestmark = pytest.mark.usefixtures("no_gradients")


def buffer_bytes(cache: HidropCache) -> int:
    """Memory that the tensors really hold: of whole storages, each counted once."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def step(model: Any, cache: HidropCache, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Feed `tokens` [B, n] to the cache: logits, and the mask with the new tokens."""
    mask = torch.cat([mask, mask.new_ones(tokens.shape)], dim=1)
    output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
    return output.logits, mask


# Memory and lengths.


@each_schedule
@pytest.mark.parametrize("new", [1, 2, 6])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cache_bytes_are_those_of_the_plan(
    compiled: Make, schedule: str, new: int, kv_heads: int
) -> None:
    model = compiled("llama", schedule, kv_heads=kv_heads)
    inputs = batch(model, EQUAL)
    cache = model.generate(
        **inputs, **GREEDY, max_new_tokens=new, return_dict_in_generate=True
    ).past_key_values
    plan = hidrop.plan(
        schedule, model, text_tokens=5, new_tokens=new, batch_size=len(EQUAL), dtype_bytes=4
    )
    assert cache.nbytes == buffer_bytes(cache) == plan.kv_bytes


def test_cache_bytes_in_bfloat16_are_those_of_the_plan(compiled: Make) -> None:
    model = compiled("qwen3", PRUNED, dtype=torch.bfloat16)
    cache = model.generate(
        **batch(model, EQUAL), **GREEDY, max_new_tokens=3, return_dict_in_generate=True
    ).past_key_values
    plan = hidrop.plan(PRUNED, model, text_tokens=5, new_tokens=3, batch_size=3)
    assert buffer_bytes(cache) == plan.kv_bytes


@each_schedule
def test_cache_lengths_are_the_tokens_of_each_layer(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    plan = hidrop.plan(schedule, model, text_tokens=5)
    inputs = batch(model, EQUAL)
    cache = model(**inputs).past_key_values
    assert [layer.filled for layer in cache.layers] == list(plan.tokens)
    assert [cache.get_seq_length(k) for k in range(4)] == list(plan.tokens)
    assert cache.get_seq_length() == 14
    assert len(cache) == 4
    mask = inputs["attention_mask"]
    for count in (1, 3):
        before = cache.get_seq_length()
        _, mask = step(model, cache, torch.full((3, count), 9), mask)
        assert cache.get_seq_length() == before + count
    assert [layer.filled for layer in cache.layers] == [tokens + 4 for tokens in plan.tokens]
    assert repr([tokens + 4 for tokens in plan.tokens]) in repr(cache)


@each_schedule
@pytest.mark.parametrize("padding", ["left", "right"])
def test_cached_keys_and_values_are_those_of_the_reference(
    compiled: Make, schedule: str, padding: Any
) -> None:
    model = compiled("qwen2", schedule, kv_heads=2)
    inputs = batch(model, RAGGED, padding=padding)
    # The reference counts ids from the first real token; so does generate, by the mask.
    ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    cache = model(**inputs, position_ids=ids).past_key_values
    reference = Reference(model, hidrop.Schedule.parse(schedule))
    for b, row in enumerate(split_batch(model, inputs)):
        expected = reference.prefill(row.input_ids, row.features).caches
        for layer, theirs in zip(cache.layers, expected, strict=True):
            count = len(theirs.columns)
            keys, values = layer.keys[b, :, :count], layer.values[b, :, :count]
            torch.testing.assert_close(keys, theirs.keys.transpose(0, 1), **CLOSE)
            torch.testing.assert_close(values, theirs.values.transpose(0, 1), **CLOSE)


def test_turns_grow_the_buffers_and_keep_their_contents(compiled: Make) -> None:
    """Far past the room of the buffers: 150 tokens, one and several at a time, as from a longer generate."""
    model = compiled()
    inputs = batch(model, RAGGED)
    length = inputs["input_ids"].shape[1]
    whole = model.generate(
        **inputs, **GREEDY, max_new_tokens=151, return_dict_in_generate=True, output_logits=True
    )
    tokens = whole.sequences[:, length:]
    output = model.generate(**inputs, **GREEDY, max_new_tokens=1, return_dict_in_generate=True)
    cache, mask, done = output.past_key_values, inputs["attention_mask"], 0
    sizes = [buffer_bytes(cache)]
    for count in (1, 1, 5, 70, 1, 72):
        logits, mask = step(model, cache, tokens[:, done : done + count], mask)
        done += count
        expected = torch.stack(whole.logits[done - count + 1 : done + 1], dim=1)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        sizes.append(buffer_bytes(cache))
    assert done == 150
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 4, "buffers grow in large steps, not at every token"


# What beam search, assisted decoding and users do with a cache.


@each_schedule
def test_reordered_rows_continue_as_their_originals(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    order = torch.tensor([2, 0, 0, 3])
    inputs = batch(model, RAGGED)
    cache = model(**inputs).past_key_values
    _, mask = step(model, cache, torch.tensor([[9], [8], [7], [6]]), inputs["attention_mask"])
    straight, _ = step(model, cache, torch.tensor([[3], [4], [5], [6]])[order.argsort()], mask)
    cache.crop(-1)

    tokens = torch.tensor([[11, 12], [13, 14], [15, 16], [17, 18]])
    apart = []
    for row in order.tolist():
        logits, _ = step(model, cache, tokens[[row] * 4], mask)
        apart.append(logits[row])
        cache.crop(-2)
    cache.reorder_cache(order)
    logits, _ = step(model, cache, tokens[order], mask[order])
    torch.testing.assert_close(logits, torch.stack(apart), **CLOSE)
    assert straight.shape == (4, 1, logits.shape[-1])


@each_schedule
def test_repeated_rows_continue_as_their_original(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, RAGGED, padding="right")
    cache = model(**inputs).past_key_values
    cache.batch_repeat_interleave(2)
    assert {layer.batch_size for layer in cache.layers} == {8}
    mask = inputs["attention_mask"].repeat_interleave(2, dim=0)
    tokens = torch.arange(3, 11)[:, None]
    logits, _ = step(model, cache, tokens, mask)
    for copy in (0, 1):
        once = model(**inputs).past_key_values
        expected, _ = step(model, once, tokens[copy::2], inputs["attention_mask"])
        torch.testing.assert_close(logits[copy::2], expected, **CLOSE)


@each_schedule
def test_cropped_tokens_leave_no_trace(compiled: Make, schedule: str) -> None:
    model = compiled("llama", schedule)
    inputs = batch(model, RAGGED)
    right, wrong = torch.tensor([[9, 10, 11]] * 4), torch.tensor([[20, 21, 22]] * 4)
    expected, mask = None, inputs["attention_mask"]
    straight = model(**inputs).past_key_values
    _, one = step(model, straight, right[:, :1], mask)
    expected, _ = step(model, straight, right[:, 1:], one)

    cache = model(**inputs).past_key_values
    _, one = step(model, cache, right[:, :1], mask)
    step(model, cache, wrong, one)
    length = cache.get_seq_length()
    cache.crop(-3)
    assert cache.get_seq_length() == length - 3
    logits, _ = step(model, cache, right[:, 1:], one)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert [a.filled for a in cache.layers] == [b.filled for b in straight.layers]


def test_cropping_to_the_prompt_continues_as_the_first_time(compiled: Make) -> None:
    model = compiled()
    inputs = batch(model, RAGGED)
    cache = model(**inputs).past_key_values
    before = [layer.filled for layer in cache.layers]
    first, _ = step(model, cache, torch.tensor([[9]] * 4), inputs["attention_mask"])
    cache.crop(-1)
    assert [layer.filled for layer in cache.layers] == before
    again, _ = step(model, cache, torch.tensor([[9]] * 4), inputs["attention_mask"])
    torch.testing.assert_close(again, first, **CLOSE)


def test_padding_among_new_tokens_changes_nothing(compiled: Make) -> None:
    """A second turn whose rows are of unequal length: pads on the left of it change nothing."""
    model = compiled()
    inputs = batch(model, RAGGED)
    mask = inputs["attention_mask"]
    turns = [[9, 10, 11], [12], [13, 14], [15, 16, 17]]
    padded = batch(model, turns, padding="left")
    cache = model(**inputs).past_key_values
    whole = torch.cat([mask, padded["attention_mask"]], dim=1)
    logits = model(
        input_ids=padded["input_ids"], attention_mask=whole, past_key_values=cache
    ).logits[:, -1]
    following, _ = step(model, cache, torch.tensor([[5]] * 4), whole)
    for b, turn in enumerate(turns):
        alone = model(**inputs).past_key_values
        tokens = torch.tensor([turn] * 4)
        expected, one = step(model, alone, tokens, mask)
        torch.testing.assert_close(logits[b], expected[b, -1], **CLOSE)
        expected, _ = step(model, alone, torch.tensor([[5]] * 4), one)
        torch.testing.assert_close(following[b], expected[b], **CLOSE)


def test_two_caches_do_not_share_memory(compiled: Make) -> None:
    model = compiled()
    inputs = batch(model, RAGGED)
    first = model(**inputs).past_key_values
    before = [layer.keys[:, :, : layer.filled].clone() for layer in first.layers]
    other = batch(model, [[3, 4, IMAGE], [5, 6, 7], [IMAGE], [IMAGE, 9]], seed=3)
    model(**other)
    model.generate(**other, max_new_tokens=4)
    for layer, keys in zip(first.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : layer.filled], keys)


def test_prefill_fills_a_given_empty_cache() -> None:
    model = hidrop.compile(tiny_llava(), PRUNED, backend="eager")
    inputs = batch(model, RAGGED)
    cache = HidropCache(max_length=20)
    output = model(**inputs, past_key_values=cache)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(**inputs, past_key_values=cache)
    assert torch.equal(again.logits, output.logits)
