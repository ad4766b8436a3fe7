"""The vision tower beside the text-only layers: one after the other on a CPU, two streams on a GPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support import counter
from tests.support.devices import devices
from tests.support.generation import new_tokens
from tests.support.models import IMAGE, PRUNED, batch, tiny_llava
from tests.support.reference import reference_generate

ROWS = [[5, 6, IMAGE, 7], [8, 9], [4, IMAGE, 5, IMAGE, 7, 9]]
NEW = 10


def overlapped(device: str, schedule: str = PRUNED, **options: Any) -> Any:
    options = {"backend": "eager", "overlap_vision": True} | options
    return hidrop.compile(tiny_llava("qwen2").to(device), schedule, **options)


def programs(model: Any) -> list[list[str]]:
    """Names of the passes of every prefill program."""
    (capture,) = runtime_of(model).programs.captures.values()
    made = [e for e in capture.executables.values() if e.program.kind == "prefill"]
    return [[stage.name for stage in e.program.history] for e in made]


@devices
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("rows", [ROWS, [[5, IMAGE, 6]], [[5, IMAGE, 6], [7, IMAGE, 8]]])
def test_overlapped_vision_equals_the_reference(device: str, cuda_graphs: bool, rows: Any) -> None:
    model = overlapped(device, cuda_graphs=cuda_graphs, bucket_multiple=8)
    inputs = batch(model, rows)
    expected = reference_generate(
        tiny_llava("qwen2").to(device), runtime_of(model).schedule, inputs, NEW
    )
    for _ in range(2):
        assert new_tokens(model, inputs, NEW) == expected
    assert all("overlap_vision" in names for names in programs(model))


@devices
def test_overlapped_vision_returns_the_features(device: str) -> None:
    model, serial = overlapped(device), overlapped(device, overlap_vision=False)
    inputs = batch(model, [[5, 6, IMAGE, 7]])
    with torch.no_grad():
        found, expected = (m(**inputs, use_cache=True) for m in (model, serial))
    torch.testing.assert_close(found.image_hidden_states, expected.image_hidden_states)
    torch.testing.assert_close(found.logits, expected.logits)


@devices
def test_a_prompt_that_ends_with_an_image_needs_it_at_once(device: str) -> None:
    model = overlapped(device)
    inputs = batch(model, [[5, 6, IMAGE]])
    expected = reference_generate(
        tiny_llava("qwen2").to(device), runtime_of(model).schedule, inputs, NEW
    )
    assert new_tokens(model, inputs, NEW) == expected
    assert not any("overlap_vision" in names for names in programs(model))


@pytest.mark.parametrize("schedule", ["identity", "prune=2:4"])
def test_nothing_overlaps_when_images_enter_at_once(schedule: str) -> None:
    model = overlapped("cpu", schedule)
    new_tokens(model, batch(model, [[5, 6, IMAGE, 7]]), NEW)
    assert not any("overlap_vision" in names for names in programs(model))


def test_a_whole_program_has_no_place_to_wait(caplog: pytest.LogCaptureFixture) -> None:
    model = overlapped("cpu", lowering="whole")
    with caplog.at_level(logging.INFO, logger="hidrop_fx"):
        new_tokens(model, batch(model, [[5, 6, IMAGE, 7]]), NEW)
    assert "leaves no place to wait" in caplog.text


def test_vision_is_not_overlapped_on_cpu_by_default() -> None:
    model = overlapped("cpu", overlap_vision=None)
    new_tokens(model, batch(model, [[5, 6, IMAGE, 7]]), NEW)
    assert not any("overlap_vision" in names for names in programs(model))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_overlapped_vision_changes_no_mode_that_repeats_rows_or_drafts(
    options: dict[str, Any],
) -> None:
    model, serial = overlapped("cpu"), overlapped("cpu", overlap_vision=False)
    rows = [[5, 6, IMAGE, 5, 6]] if "prompt_lookup_num_tokens" in options else ROWS
    inputs = batch(model, rows)
    answers = []
    for each in (model, serial):
        torch.manual_seed(0)
        answers.append(each.generate(**inputs, max_new_tokens=NEW, **options).tolist())
    assert answers[0] == answers[1]


def test_layers_of_the_tower_share_one_compiled_layer() -> None:
    model = overlapped("cpu", backend="inductor", lowering="bodies")
    plain = tiny_llava("qwen2")
    inputs = batch(model, [[5, IMAGE, 6]])
    expected = reference_generate(plain, runtime_of(model).schedule, inputs, NEW)
    with counter.expect() as made:
        assert new_tokens(model, inputs, NEW) == expected
    layers = model.model.vision_tower.encoder.layers
    assert 0 < counter.names(made.compiled)["vision layer"] <= 3 < 3 * len(layers)
    hidrop.restore(model)
    assert not any("forward" in vars(layer) for layer in layers)
