"""What a prune asks of other processes, where they divide the heads of a layer: exact node counts in one of two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch import fx

import hidrop_fx as hidrop
from hidrop_fx.ops import tensor_parallel as ops
from hidrop_fx.ops import tokens
from hidrop_fx.pipeline.pipeline import build_program
from hidrop_fx.program.variant import Kind
from hidrop_fx.runtime.captures import Capture, capture_model
from hidrop_fx.runtime.fitting import fitted
from tests.support.divided import divide, one_of_two
from tests.support.models import tiny_llava

ASKED = (ops.mean_of_processes, ops.gather, ops.of_first_process)


@pytest.fixture(scope="module")
def divided() -> Iterator[tuple[Any, Capture]]:
    with one_of_two():
        model = divide(tiny_llava(num_layers=2))
        yield model, capture_model(model)


def nodes(divided: tuple[Any, Capture], schedule: str, kind: Kind = "prefill") -> list[fx.Node]:
    model, captured = divided
    _, plan = fitted(model, hidrop.Schedule.parse(schedule))
    return list(build_program(captured.decoder, plan, kind).graph.nodes)


@pytest.mark.parametrize(
    ("schedule", "asked"),
    [
        ("exit=1", {}),
        ("prune=0:4+1:2", {ops.mean_of_processes: 2}),
        ("fastv(layer=1)", {ops.mean_of_processes: 1}),
        ("ivc-prune(layer=1)", {ops.gather: 1}),
        ("prune=1:4,score=gravity_raters(heads=3)", {ops.gather: 2}),
        ("prune=1:4,score=state_change", {}),
        ("prune=1:4,score=random", {ops.of_first_process: 1}),
        ("prune=1:4,merge=nearest_key", {ops.mean_of_processes: 1, ops.gather: 1}),
        ("snapkv(window=2,capacity=6)", {}),
    ],
)
def test_scores_are_brought_together(
    divided: tuple[Any, Capture], schedule: str, asked: dict[Any, int]
) -> None:
    found = Counter(n.target for n in nodes(divided, schedule) if n.target in ASKED)
    assert found == asked


def test_what_is_gathered_is_of_all_heads(divided: tuple[Any, Capture]) -> None:
    (gathered,) = (n for n in nodes(divided, "ivc-prune(layer=1)") if n.target is ops.gather)
    assert gathered.args[1:4] == (1, 0, 2)
    assert gathered.meta["val"].shape[1] == 4


def test_a_gate_enters_the_values_of_heads_and_not_the_states(
    divided: tuple[Any, Capture],
) -> None:
    """The gradient of a learned ratio comes from the values of all heads, and from the whole states once."""
    made = nodes(divided, "prune=1:4,selection=dtopk", "train")
    gates = {
        n.target: n.args[1] for n in made if n.target in (tokens.gate_values, tokens.gate_states)
    }
    entered = gates[tokens.gate_values]
    assert isinstance(entered, fx.Node)
    assert entered.target is ops.enter
    assert entered.args[0] is gates[tokens.gate_states]
