"""Processes that hold a decoder together compare their schedules wherever the schedule changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
from hidrop_fx.runtime import engines
from tests.support.divided import divide, one_of_two
from tests.support.models import IMAGE, batch, tiny_llava


def test_divided_models_compare_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that change apart would run other layers, and sum what does not belong together."""
    compared: list[tuple[str, bool]] = []

    def note(mesh: Any, text: str, *, changes: bool) -> None:
        assert mesh.size() == 2
        compared.append((text.partition(" on ")[0], changes))

    monkeypatch.setattr(engines, "check_agreement", note)
    with one_of_two(), torch.no_grad():
        model = divide(tiny_llava(num_layers=3, kv_heads=2))
        hidrop.compile(model, {"first": "exit=2", "second": "inject=1"}, backend="eager")
        inputs = batch(model, [[5, 6, IMAGE, 7]])
        for name in ("first", "first", "second", "second", "first"):
            with hidrop.use(model, name):
                model(**inputs)
    assert compared == [("exit=2", False), ("inject=1", True), ("exit=2", True)]
