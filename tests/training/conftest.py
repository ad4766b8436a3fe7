"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ratios import TRAINED


@pytest.fixture(autouse=True)
def trained_models_go_back_to_their_start() -> Iterator[None]:
    yield
    for model, start in TRAINED.values():
        model.train().zero_grad(set_to_none=True)
        if start is not None:
            model.hidrop_ratios.values.data.copy_(start)
