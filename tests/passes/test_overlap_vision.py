"""The vision tower beside the text-only layers: one after the other on a CPU, two streams on a GPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hidrop_fx as hidrop
from hidrop_fx.runtime.hf import tower
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


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the tower are traced and logged as ever, and run as traced."""
    made = tower.logged_compiler
    monkeypatch.setattr(tower, "logged_compiler", lambda _, *given: made("eager", *given))


def encode(model: Any, images: int) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model.model.vision_tower(
            torch.randn(images, 3, 12, 12, generator=torch.Generator().manual_seed(images))
        ).last_hidden_state
    return states


@pytest.mark.usefixtures("without_inductor")
def test_a_layer_of_the_tower_is_compiled_for_any_number_of_images() -> None:
    model, plain = overlapped("cpu", backend="inductor"), tiny_llava("qwen2")
    encode(model, 1), encode(model, 2)
    with counter.expect(compiled=0):
        for images in (3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2):
            torch.testing.assert_close(encode(model, images), encode(plain, images))


@pytest.mark.usefixtures("without_inductor")
def test_layers_of_the_tower_go_by_the_policy_for_new_shapes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="hidrop_fx")
    plain = tiny_llava("qwen2")
    model = overlapped("cpu", backend="inductor", on_new_shape="eager")
    with counter.expect(compiled=0):
        torch.testing.assert_close(encode(model, 2), encode(plain, 2))
    assert "vision layer for * images was not warmed up: it runs eagerly" in caplog.text
    model = overlapped("cpu", backend="inductor", on_new_shape="error")
    with pytest.raises(hidrop.InputError, match="vision layer for 1 images was not warmed up"):
        encode(model, 1)


def test_a_tower_that_does_not_compile_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(tower, "logged_compiler", lambda *_: broken)
    model, plain = overlapped("cpu", backend="inductor"), tiny_llava("qwen2")
    with counter.expect(fallbacks=1) as made:
        for images in (1, 2):
            torch.testing.assert_close(encode(model, images), encode(plain, images))
    assert "no such compiler" in made.fallbacks[0]
    torch._dynamo.reset()  # which skips a function that once failed to compile


@pytest.mark.usefixtures("without_inductor")
def test_a_mode_that_sees_every_operator_sees_those_of_the_tower() -> None:
    counts = []
    for model in (overlapped("cpu", backend="inductor"), tiny_llava("qwen2")):
        with FlopCounterMode(display=False) as flops:
            encode(model, 2)
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
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
