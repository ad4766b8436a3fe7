"""Warm-up: what is made ahead, and what calls of other shapes do then."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.errors import HidropError, InputError, ScheduleError
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support import counter
from tests.support.devices import devices
from tests.support.generation import new_tokens
from tests.support.graphed import MULTIPLE, NEW, ROWS, Models, reference_tokens
from tests.support.models import IMAGE, PRUNED, batch, tiny_llava
from tests.support.reference import reference_generate


def mixed_requests(model: Any, count: int) -> Iterator[dict[str, Tensor]]:
    generator = random.Random(0)
    for _ in range(count):
        rows = []
        for _ in range(generator.choice([1, 2, 4])):
            words = [generator.randrange(3, 90) for _ in range(generator.randrange(2, 15))]
            words.insert(generator.randrange(len(words)), IMAGE)
            rows.append(words)
        yield batch(model, rows, padding=generator.choice(["left", "right"]))


def shapes(new_tokens: int) -> list[hidrop.Shape]:
    return [
        hidrop.Shape(batch=b, text=text, images=1, new_tokens=new_tokens)
        for b in (1, 2, 4)
        for text in (MULTIPLE, 2 * MULTIPLE)
    ]


@devices
def test_200_calls_record_nothing_that_was_not_announced(model_on: Models, device: str) -> None:
    model = model_on(device, PRUNED, on_new_shape="error")
    # By batch: two prompts, and steps of 8 tokens behind each, three of which they have in common.
    with counter.expect(compiled=0, recorded=3 * (2 + 4)) as made:
        announced = hidrop.warmup(model, shapes(NEW))
    assert [f"{entry.name} ({entry.shapes})" for entry in announced] == made.recorded
    with counter.expect(compiled=0, recorded=0):
        for index, inputs in enumerate(mixed_requests(model, 200)):
            model.generate(**inputs, max_new_tokens=1 + index % NEW, do_sample=False)


def test_warm_up_of_inductor_compiles_all_that_calls_need(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llava("qwen2", num_layers=2)
    hidrop.compile(model, "inject=1,prune=1:4", on_new_shape="error")
    with pytest.raises(InputError, match="was not warmed up, and on_new_shape='error'"):
        model.generate(**batch(model, [[5, IMAGE, 6]]), max_new_tokens=2)
    made = hidrop.warmup(model, [hidrop.Shape(batch=b, text=4, new_tokens=2) for b in (1, 2)])
    assert {entry.name.split()[0] for entry in made} == {"prefill", "decode"}
    with counter.expect(compiled=0, recorded=0):
        for inputs in mixed_requests(model, 12):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)


@devices
def test_an_unannounced_shape_runs_eagerly(
    model_on: Models, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = model_on(device, PRUNED, on_new_shape="eager"), model_on(device, None)
    hidrop.warmup(model, [hidrop.Shape(text=MULTIPLE, new_tokens=NEW)])
    inputs = batch(model, ROWS)
    with caplog.at_level(logging.INFO, logger="hidrop_fx"), counter.expect(recorded=0):
        assert new_tokens(model, inputs, NEW) == reference_tokens(plain, model, inputs)
    assert caplog.text.count("a KV buffer of") == 1
    assert "it runs eagerly (on_new_shape='eager')" in caplog.text


def test_warm_up_needs_a_compiled_model_and_sizes() -> None:
    with pytest.raises(HidropError, match="is not compiled"):
        hidrop.warmup(tiny_llava("llama"), [hidrop.Shape()])
    with pytest.raises(ScheduleError, match="text=1"):
        hidrop.Shape(text=1)
    with pytest.raises(HidropError, match="on_new_shape='never'"):
        hidrop.compile(tiny_llava("llama"), "identity", on_new_shape="never")


@pytest.mark.parametrize("shapes", [[{"batch": 1}], hidrop.Shape(batch=1), "abc"], ids=str)
def test_warm_up_refuses_all_but_a_list_of_shapes(shapes: Any) -> None:
    model: Any = hidrop.compile(tiny_llava(num_layers=2), "exit=1", backend="eager")
    with pytest.raises(hidrop.InputError, match=r"give a list, \[hidrop_fx\.Shape\("):
        hidrop.warmup(model, shapes)


def errors_on_new_shapes(**options: Any) -> Any:
    chosen = {"backend": "eager", "cuda_graphs": True, "bucket_multiple": MULTIPLE} | options
    return hidrop.compile(tiny_llava("llama"), PRUNED, on_new_shape="error", **chosen)


@torch.no_grad()
def test_a_refused_step_leaves_the_cache_as_it_was() -> None:
    model = errors_on_new_shapes()
    hidrop.warmup(model, [hidrop.Shape(text=8, new_tokens=8)])
    inputs = batch(model, [[5, IMAGE, 6]])
    wanted = reference_generate(tiny_llava("llama"), runtime_of(model).schedule, inputs, NEW)[0]
    output = model(**inputs, logits_to_keep=1)
    cache, found = output.past_key_values, []
    for _ in range(NEW):
        found.append(int(output.logits[0, -1].argmax()))
        step = {"input_ids": torch.tensor([found[-1:]]), "past_key_values": cache}
        before = cache.get_seq_length(), cache.log.columns, [layer.filled for layer in cache.layers]
        try:
            output = model(**step)
        except InputError:
            assert before[::2] == (cache.get_seq_length(), [layer.filled for layer in cache.layers])
            assert all(torch.equal(cache.log.columns[k], v) for k, v in before[1].items())
            hidrop.warmup(model, [hidrop.Shape(text=8, new_tokens=NEW)])
            output = model(**step)
    assert found == wanted


@pytest.mark.parametrize("overlap_vision", [False, True])
def test_warm_up_sizes_buffers_for_all_shapes(overlap_vision: bool) -> None:
    """Text-only layers need most for a long text, the others for many images."""
    model = errors_on_new_shapes(overlap_vision=overlap_vision)
    shapes = [hidrop.Shape(text=8, images=6, new_tokens=8), hidrop.Shape(text=40, new_tokens=8)]
    hidrop.warmup(model, shapes)
    with counter.expect(compiled=0, recorded=0):
        for row in ([5, 6, *[IMAGE] * 6, 7], [*range(5, 40), IMAGE, 6]):
            new_tokens(model, batch(model, [row]), 8)


@pytest.mark.slow
def test_warm_up_takes_calls_in_place_of_shapes() -> None:
    model = errors_on_new_shapes(backend="aot_eager", cuda_graphs=False)
    inputs = batch(model, ROWS[:1])
    hidrop.warmup(model, [hidrop.Shape(text=8, new_tokens=4)])
    with torch.inference_mode():
        plain = new_tokens(model, inputs, 8)
    drafting = {"prompt_lookup_num_tokens": 3}
    with pytest.raises(InputError, match="give a call like it"):
        new_tokens(model, inputs, 8, **drafting)
    hidrop.warmup(model, [lambda: new_tokens(model, inputs, 8, **drafting)])
    assert new_tokens(model, inputs, 8, **drafting) == plain


def test_warm_up_covers_every_length_where_each_is_a_bucket() -> None:
    model = errors_on_new_shapes(bucket_multiple=1)
    hidrop.warmup(model, [hidrop.Shape(text=5, new_tokens=4)])
    assert len(new_tokens(model, batch(model, [[5, 6, IMAGE, 7, 8, 9]]), 4)[0]) == 4


def test_warm_up_refuses_image_tokens_that_no_image_has() -> None:
    with pytest.raises(InputError, match="every image of this model has 9 tokens"):
        hidrop.warmup(errors_on_new_shapes(), [hidrop.Shape(image_tokens=5)])
