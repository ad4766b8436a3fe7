"""Fixtures that all tests share: tiny models, compiled or not, made once and checked after every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import hidrop_fx as hidrop
from hidrop_fx.methods import CACHE_CUTS, METHODS, REDUCERS, SCORERS
from hidrop_fx.runtime import captures as captures_module
from hidrop_fx.runtime.hf.binding import runtime_of
from tests.support.capture_police import watching
from tests.support.captured import CapturedModel
from tests.support.models import PRUNED, Make, tiny_llava
from tests.support.shared_exports import exports_shared

_QUIET = dict.fromkeys(("deadline", "database")) | {"suppress_health_check": list(HealthCheck)}
settings.register_profile("stable", derandomize=True, **_QUIET)
settings.register_profile("explore", derandomize=False, print_blob=True, **_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "stable"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other on 32-wide matrices take twenty times as long as one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def recordable() -> Iterator[list[str]]:
    """Let no recording of a test do what a CUDA graph would not bear; one that shall clears what was found."""
    with watching() as found:
        yield found
    assert not found, "\n".join(found)


@pytest.fixture(autouse=True)
def _equal_decoders_share_an_export(request: pytest.FixtureRequest) -> Iterator[None]:
    """Export takes most of a test's time; tests of capture itself export for themselves."""
    if "capture" in request.path.parts:
        yield
    else:
        with exports_shared():
            yield


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Run the test under `torch.no_grad()`."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def plain() -> Make:
    """`plain("qwen2", sliding_window=6)`: a model that no test compiles or changes."""
    made: dict[Any, Any] = {}

    def make(backbone: str = "llama", **options: Any) -> Any:
        key = (backbone, *sorted(options.items()))
        if key not in made:
            made[key] = tiny_llava(backbone, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def _compiled_models() -> dict[Any, tuple[Any, Any]]:
    return {}


@pytest.fixture(scope="session")
def compiled(_compiled_models: dict[Any, tuple[Any, Any]]) -> Make:
    """`compiled("llama", PRUNED)`: the same weights as `plain("llama")`, compiled, for all tests to use."""

    def make(backbone: str = "llama", schedule: str = PRUNED, **options: Any) -> Any:
        key = (backbone, schedule, *sorted(options.items()))
        if key not in _compiled_models:
            model = hidrop.compile(tiny_llava(backbone, **options), schedule, backend="eager")
            _compiled_models[key] = model, runtime_of(model)
        return _compiled_models[key][0]

    return make


@pytest.fixture
def fresh() -> Make:
    """`fresh("llama", PRUNED)`: a compiled model that the test may change."""

    def make(backbone: str = "llama", schedule: str = PRUNED, **options: Any) -> Any:
        return hidrop.compile(tiny_llava(backbone, **options), schedule, backend="eager")

    return make


@pytest.fixture(scope="session")
def llama() -> CapturedModel:
    """Tiny Llama and its capture, for programs of one's own."""
    return CapturedModel()


@pytest.fixture(scope="session")
def mistral_window() -> CapturedModel:
    """Tiny Mistral and its capture: a sliding window in every layer."""
    return CapturedModel("mistral", 4)


@pytest.fixture(scope="session")
def qwen_window() -> CapturedModel:
    """Tiny Qwen2 and its capture: a sliding window in every second layer."""
    return CapturedModel("qwen2", 4)


@pytest.fixture(scope="module")
def one_capture_a_model() -> Iterator[None]:
    """A captured decoder knows of no schedule, and no program may change it: all of a model's share one."""
    captured: dict[Any, Any] = {}
    original = captures_module.capture

    def capture(decoder: Any, **options: Any) -> Any:
        key = id(decoder), decoder.training
        if key not in captured:
            captured[key] = decoder, original(decoder, **options)
        return captured[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captures_module, "capture", capture)
        yield


@pytest.fixture(autouse=True)
def _forget_registrations() -> Iterator[None]:
    """Take back what a test registered: errors list the scorers there are, whichever test ran before."""
    known = [
        (registry, dict(registry.items())) for registry in (SCORERS, METHODS, REDUCERS, CACHE_CUTS)
    ]
    yield
    for registry, entries in known:
        for name in [name for name in registry if name not in entries]:
            registry.remove(name)
        for name, entry in entries.items():
            registry.add(name, entry, replace=True)


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_are(
    _compiled_models: dict[Any, tuple[Any, Any]],
) -> Iterator[None]:
    yield
    for model, runtime in _compiled_models.values():
        assert runtime_of(model) is runtime, "the test compiled or restored a shared model"
        assert not model.training, "the test left a shared model in train mode"
        model.zero_grad(set_to_none=True)
