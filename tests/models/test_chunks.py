"""Llama 4: chunks behind a prompt, queries scaled by position, RoPE by complex numbers, a model without a base of its own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import hidrop_fx as hidrop
from hidrop_fx import Schedule
from hidrop_fx.capture.complex_rotation import make_real
from tests.support.families import CASES, ROWS, make_batch
from tests.support.families.chunked import CHUNK, llama4
from tests.support.generation import new_tokens
from tests.support.runtimes import compiled_eagerly

WORDS: list[list[int | str]] = [[5, 6, 7, 8, 9, 3, 4, 11], [4, 5, 6], [8, 9, 3, 7, 5]]
pytestmark = pytest.mark.usefixtures("one_capture_a_model")


@pytest.fixture(scope="module")
def model() -> Any:
    return llama4()


def words(model: Any, rows: list[list[int | str]], padding: Any = "left") -> dict[str, Any]:
    """Rows without images."""
    return make_batch(CASES["llama4"], model, rows, padding).inputs


@torch.no_grad()
def test_rows_go_on_over_the_ends_of_chunks_as_each_does_alone(model: Any) -> None:
    alone = [new_tokens(model, words(model, [row]), 2 * CHUNK)[0] for row in WORDS]
    with compiled_eagerly(model, Schedule()):
        for side in ("left", "right"):
            inputs = words(model, WORDS, side)
            assert new_tokens(model, inputs, 2 * CHUNK) == alone


@pytest.mark.slow
@torch.no_grad()
def test_beams_take_their_chunks_along(model: Any) -> None:
    """The scale of a query at its default, which no place here reaches: HF's own counts padding."""
    plain = llama4(floor_scale=8192)
    inputs = words(plain, WORDS)
    wanted = new_tokens(plain, inputs, CHUNK + 2, num_beams=3)
    with compiled_eagerly(plain, Schedule()):
        assert new_tokens(plain, inputs, CHUNK + 2, num_beams=3) == wanted


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(inject=1, prune={1: 3, 2: 0.2}),
        Schedule(inject=0, prune={2: 2}, exit=3, positions="compact"),
        Schedule(inject=0, reads=(0, 1, 2)),
    ],
    ids=str,
)
def test_the_plain_loop_sees_the_same(model: Any, schedule: Schedule) -> None:
    inputs = make_batch(CASES["llama4"], model, ROWS, "left").inputs
    with compiled_eagerly(model, schedule):
        assert hidrop.compare(model, **inputs).ok


@torch.no_grad()
def test_a_score_by_the_tables_of_rope_is_refused(model: Any) -> None:
    """They are one table of pairs, no cosines and sines by themselves."""
    inputs = make_batch(CASES["llama4"], model, ROWS[:1]).inputs
    schedule = Schedule(inject=0, prune={2: 2}, score="value_similarity")
    with (
        compiled_eagerly(model, schedule),
        pytest.raises(hidrop.HidropError, match="tables of RoPE"),
    ):
        model(**inputs)


def test_it_cannot_be_calibrated(model: Any) -> None:
    with pytest.raises(hidrop.HidropError, match="layers that attend by chunks"):
        hidrop.calibrate(model, [words(model, WORDS)], progress=False)


@torch.no_grad()
def test_copies_and_restored_models_are_whole(model: Any) -> None:
    """The model is its own base: its forward is replaced once, and given back."""
    inputs = words(model, WORDS)
    own = model(**inputs).logits
    with compiled_eagerly(model, Schedule()):
        wanted = model(**inputs).logits
        for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
            assert hidrop.is_compiled(twin)
            torch.testing.assert_close(twin(**inputs).logits, wanted, rtol=0, atol=0)
    assert "forward" not in model.__dict__
    assert all(m.self_attn.attn_temperature_tuning for m in model.language_model.model.layers)
    torch.testing.assert_close(model(**inputs).logits, own, rtol=0, atol=0)


def test_complex_numbers_become_pairs() -> None:
    """Two turns, a scale, and a table made by an angle, against torch's own arithmetic."""

    def turned(states: Tensor, angles: Tensor) -> Tensor:
        table = torch.polar(torch.ones_like(angles), angles) * 0.5
        pairs = torch.view_as_complex(states.reshape(2, 3, 2, 4, 2))
        return torch.view_as_real(pairs * table[:, :, None, :]).flatten(2)

    given = torch.randn(2, 3, 16), torch.randn(2, 3, 4)
    graph = torch.export.export(_Function(turned), given).graph_module
    assert any(_is_complex(node) for node in graph.graph.nodes)
    make_real(graph.graph)
    graph.recompile()
    assert not any(_is_complex(node) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(*given)[0], turned(*given))


def test_other_arithmetic_on_complex_numbers_stays_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def odd(states: Tensor) -> Tensor:
        return torch.view_as_complex(states).angle()

    graph = torch.export.export(_Function(odd), (torch.randn(2, 3, 2),)).graph_module
    before = str(graph.graph)
    with caplog.at_level("INFO", logger="hidrop_fx"):
        make_real(graph.graph)
    assert str(graph.graph) == before
    assert "none of a rotary embedding's: they stay" in caplog.text


class _Function(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function

    def forward(self, *given: Tensor) -> Tensor:
        found: Tensor = self._function(*given)
        return found


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()
