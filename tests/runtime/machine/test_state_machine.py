"""Whatever happened before, an answer is that of a fresh model: random lives of one compiled model.

pytest tests/runtime/machine                   # a dozen short lives
pytest tests/runtime/machine -m slow           # three hundred longer ones, in pieces
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.runtime.machine.failures import Failures

SHORT, SHORT_STEPS = 8, 8
LONG, LONG_STEPS = 300, 15
PIECES = 20


class CompiledModel(Failures):
    """All the steps."""


def lives(count: int, steps: int) -> settings:
    # A step costs up to a second: what fails is shrunk by hand.
    return settings(
        max_examples=count,
        stateful_step_count=steps,
        derandomize=False,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def test_short_lives_give_the_answers_of_fresh_models() -> None:
    machine = seed(0)(type("Life", (CompiledModel,), {}))
    run_state_machine_as_test(machine, settings=lives(SHORT, SHORT_STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
def test_long_lives_give_the_answers_of_fresh_models(piece: int) -> None:
    machine = seed(1 + piece)(type("Life", (CompiledModel,), {}))
    run_state_machine_as_test(machine, settings=lives(LONG // PIECES, LONG_STEPS))
