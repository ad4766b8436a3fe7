"""Many images, many vision tokens, many rows, many calls."""

from __future__ import annotations

import gc
import random
import resource
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.models import IMAGE, PRUNED, Make, batch, tiny_llava
from tests.support.reference import Cut, Reference, reference_generate
from tests.support.runtimes import runtime_in

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "heads": 2}
PRUNED_IN_TWO = "inject=0,prune=1:2"
NEW = 3


pytestmark = pytest.mark.usefixtures("no_gradients")


def answered(model: Any, inputs: dict[str, Tensor], new: int = NEW) -> tuple[list[list[int]], int]:
    """New tokens, and bytes of the cache."""
    output = model.generate(**inputs, **GREEDY, max_new_tokens=new, return_dict_in_generate=True)
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return tokens, output.past_key_values.nbytes


def planned_bytes(model: Any, *, images: int, text: int, rows: int = 1) -> int:
    runtime = runtime_in(model)
    return hidrop.plan(
        runtime.schedule,
        model,
        images=images,
        text_tokens=text,
        new_tokens=NEW,
        batch_size=rows,
        dtype_bytes=4,
    ).kv_bytes


@pytest.mark.parametrize("schedule", ["identity", PRUNED])
def test_32_images_in_one_prompt_equal_the_reference(
    compiled: Make, plain: Make, schedule: str
) -> None:
    model = compiled("llama", schedule)
    row: list[int | str] = [4, 5]
    for word in range(32):
        row += [IMAGE, 6 + word]
    inputs = batch(model, [row])
    found, cache_bytes = answered(model, inputs)
    assert found == reference_generate(plain("llama"), runtime_of(model).schedule, inputs, NEW)
    assert cache_bytes == planned_bytes(model, images=32, text=34)


@pytest.mark.parametrize(("images", "side"), [(1, 100), (100, 10)])
def test_10000_vision_tokens_equal_the_reference(images: int, side: int) -> None:
    """Hugging Face gives the answer and the states; the reference, whose masks would be too large, scores them."""
    plain = tiny_llava(**SMALL, image_tokens=side * side)
    model = tiny_llava(**SMALL, image_tokens=side * side)
    inputs = batch(model, [[4, 5, *[IMAGE] * images, 6, 7]])
    hidrop.compile(model, "identity", backend="eager")
    found, cache_bytes = answered(model, inputs)
    assert found == plain.generate(**inputs, **GREEDY, max_new_tokens=NEW)[:, -NEW:].tolist()
    assert cache_bytes == planned_bytes(model, images=images, text=4)

    hidrop.compile(model, PRUNED_IN_TWO, backend="eager")
    _, cache_bytes = answered(model, inputs)
    assert cache_bytes == planned_bytes(model, images=images, text=4)
    cache = model(**inputs).past_key_values
    assert [layer.filled for layer in cache.layers] == [10_004, 4 + 2 * images]

    cut = cut_at_layer_1(plain, inputs, 2 * images)
    assert cut.gap > 1e-5
    kept = cache.log.columns[cache.layers[1].segment][0].tolist()
    assert kept == [0, 1, *cut.kept, 10_002, 10_003]


def cut_at_layer_1(plain: Any, inputs: dict[str, Tensor], count: int) -> Cut:
    """Which vision tokens of one row the reference keeps there, given what layer 0 of HF made of all."""
    ids = inputs["input_ids"][0]
    columns = list(range(len(ids)))
    vision = (ids == plain.config.image_token_id).nonzero().flatten().tolist()
    hidden = plain(**inputs, output_hidden_states=True).hidden_states[1][0]
    reference = Reference(plain, hidrop.Schedule.parse(PRUNED_IN_TWO))
    layer = reference.decoder.layers[1]
    where = dict(zip(columns, columns, strict=True))
    return reference._cut(layer, hidden, columns, where, vision, [columns[-1]], count)


@pytest.mark.parametrize("graphs", [False, True])
def test_64_rows_equal_the_reference(plain: Make, graphs: bool) -> None:
    """Each gives what the reference gives it alone; equal rows fill what was planned."""
    model = hidrop.compile(tiny_llava(), PRUNED, backend="eager", cuda_graphs=graphs)
    draw = random.Random(0)
    rows: list[list[int | str]] = []
    for index in range(64):
        row: list[int | str] = [draw.randrange(3, 90) for _ in range(2 + index % 5)]
        for _ in range(index % 3):
            row.insert(draw.randrange(len(row)), IMAGE)
        rows.append(row)
    inputs = batch(model, rows)
    found, _ = answered(model, inputs)
    assert found == reference_generate(plain("llama"), runtime_of(model).schedule, inputs, NEW)
    if not graphs:
        equal = batch(model, [[4, IMAGE, 5, 6, index + 3] for index in range(64)])
        assert answered(model, equal)[1] == planned_bytes(model, images=1, text=4, rows=64)


@pytest.mark.parametrize(
    ("graphs", "calls"),
    [(True, 60), *(pytest.param(on, 400, marks=pytest.mark.slow) for on in (False, True))],
)
def test_many_calls_leak_nothing(graphs: bool, calls: int) -> None:
    model = tiny_llava(**SMALL)
    hidrop.compile(
        model, PRUNED_IN_TWO, backend="eager", cuda_graphs=graphs, bucket_multiple=8, max_graphs=8
    )
    requests = [
        batch(model, [[5, IMAGE, *range(6, 6 + index % 7)]] * (1 + index % 2))
        for index in range(14)
    ]

    def generate(calls: int) -> None:
        for index in range(calls):
            model.generate(**requests[index % len(requests)], **GREEDY, max_new_tokens=2)

    generate(calls // 2)
    tensors = living_tensors()
    growth = []
    for _ in range(3):  # the heap of a long test session grows once in a while, a leak every time
        memory = resident_bytes()
        generate(calls)
        growth.append(resident_bytes() - memory)
    assert living_tensors() <= tensors
    assert min(growth) < 2**20


def living_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    """Of this process now, its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
