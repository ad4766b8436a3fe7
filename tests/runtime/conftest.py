"""Fixtures of the tests of graphs and warm-up."""

from __future__ import annotations

from typing import Any

import pytest

import hidrop_fx as hidrop
from tests.support.graphed import MULTIPLE, Models
from tests.support.models import tiny_llava


@pytest.fixture(scope="module")
def models_on_buffers() -> dict[Any, Any]:
    return {}


@pytest.fixture
def model_on(models_on_buffers: dict[Any, Any]) -> Models:
    """`model_on("cpu", PRUNED)`: a model with graphs, shared by a module; None for a plain one."""

    def make(device: str, schedule: str | None, backbone: str = "qwen2", **options: Any) -> Any:
        key = (device, schedule, backbone, *options.items())
        if key not in models_on_buffers:
            model = tiny_llava(backbone).to(device)
            if schedule is not None:
                options = {"backend": "eager", "cuda_graphs": True} | options
                hidrop.compile(model, schedule, bucket_multiple=MULTIPLE, **options)
            models_on_buffers[key] = model
        return models_on_buffers[key]

    return make
