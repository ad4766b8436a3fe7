"""Fixtures of the lowering tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.captured import CapturedModel
from tests.support.lowered import LAYERS, compiled_llama


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled here outlives the module, nor does it meet what was compiled before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def llama() -> CapturedModel:
    return CapturedModel(num_layers=LAYERS)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same model on the eager backend."""
    return compiled_llama(backend="eager")[0]
