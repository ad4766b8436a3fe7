"""Compiled code after a restart: it is found again, in the right place only, and a wrong file is refused."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hidrop_fx as hidrop
import hidrop_fx.runtime.artifacts as artifacts
from hidrop_fx.lowering.gc_pause import collection_paused
from hidrop_fx.ops.attention_scores import attention_scores
from tests.support.models import batch, tiny_llava
from tests.support.paths import ROOT
from tests.support.restarted import ROW
from tests.support.runtimes import runtime_in

SCHEDULE, OTHER = "inject=1", "prune=1:4"

# What a tiny model costs, processes included; on one worker, since all read the same directory.
pytestmark = pytest.mark.xdist_group("persistence")


def restarted(cache: Path, **asked: Any) -> dict[str, Any]:
    """Run a tiny model in a process of its own, with this cache directory."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.restarted", json.dumps(asked)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert not found["fallbacks"]
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("persistence")


@pytest.fixture(scope="module")
def cold(directory: Path) -> dict[str, Any]:
    """The first process: it compiles, and writes `saved`."""
    return restarted(directory / "cache", schedule=SCHEDULE, save=str(directory / "saved"))


@pytest.fixture(scope="module")
def saved(directory: Path, cold: dict[str, Any]) -> Path:
    return directory / "saved"


def uncompiled(schedule: str) -> dict[str, Any]:
    """What the same model says without a compiler."""
    model = hidrop.compile(tiny_llava(num_layers=2), schedule, backend="eager")
    inputs = batch(model, [ROW], padding="left")
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return {"logits": logits.flatten(), "tokens": tokens.tolist()}


def assert_agrees(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(torch.tensor(found["logits"]), expected["logits"])
    assert found["tokens"] == expected["tokens"]


# Processes.


def test_first_process_compiles_and_saves_everything(cold: dict[str, Any]) -> None:
    assert cold["counters"]["autograd_cache_saved"] == cold["compiled"] > 0
    assert "autograd_cache_bypass" not in cold["counters"]
    assert_agrees(cold, uncompiled(SCHEDULE))


def test_a_saved_file_serves_a_machine_that_never_compiled(
    saved: Path, cold: dict[str, Any], tmp_path: Path
) -> None:
    warm = restarted(tmp_path, schedule=SCHEDULE, load=str(saved))
    assert warm["loaded"] is True
    assert warm["counters"]["autograd_cache_hit"] == warm["compiled"] == cold["compiled"]
    assert "autograd_cache_miss" not in warm["counters"]
    assert "fxgraph_cache_miss" not in warm["counters"]
    with zipfile.ZipFile(saved) as archive:
        brought = {Path(n).name for n in archive.namelist() if n.startswith("libraries/")}
    assert brought
    assert {library.name for library in tmp_path.rglob("*.so")} == brought  # none was built
    assert warm["logits"] == cold["logits"]
    assert warm["tokens"] == cold["tokens"]


@pytest.mark.slow
def test_another_schedule_gets_code_of_its_own(directory: Path, cold: dict[str, Any]) -> None:
    other = restarted(directory / "cache", schedule=OTHER)
    assert other["counters"]["autograd_cache_miss"] >= 1
    assert "autograd_cache_bypass" not in other["counters"]
    assert_agrees(other, uncompiled(OTHER))


@pytest.mark.slow
def test_a_pass_that_rewrites_otherwise_finds_no_code(
    directory: Path, cold: dict[str, Any]
) -> None:
    unlike = restarted(directory / "cache", schedule=SCHEDULE, unlike=True)
    assert unlike["counters"]["autograd_cache_miss"] >= 1
    assert unlike["compiled"] == cold["compiled"]
    assert_agrees(unlike, uncompiled(SCHEDULE))


# The file.


@pytest.fixture
def fresh() -> Any:
    """Compiled, and not called yet."""
    return hidrop.compile(tiny_llava(num_layers=2), SCHEDULE)


def altered(saved: Path, path: Path, **changes: Any) -> Path:
    """The file with other values in its header."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "header.json":
                content = json.dumps(json.loads(content) | changes).encode()
            new.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("schedule", "inject=0,exit=1", "with that schedule"),
        ("model", "LlavaForConditionalGeneration over Qwen2Model", "the model that it was saved"),
        ("options", "lowering='whole'", "with those options"),
        ("device", "cuda", "move the model there"),
        ("format", 99, "save it anew"),
    ],
)
def test_a_file_of_something_else_is_refused(
    fresh: Any, saved: Path, tmp_path: Path, name: str, value: Any, remedy: str
) -> None:
    path = altered(saved, tmp_path / "altered", **{name: value})
    with pytest.raises(hidrop.HidropError, match=remedy) as error:
        hidrop.load_compiled(fresh, path)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "name", ["hidrop_fx", "sources", "torch", "transformers", "python", "hardware"]
)
def test_a_file_from_another_environment_is_not_loaded(
    fresh: Any,
    saved: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", _never)
    path = altered(saved, tmp_path / "altered", **{name: "elsewhere"})
    with caplog.at_level(logging.WARNING, "hidrop_fx"):
        assert hidrop.load_compiled(fresh, path) is False
    (line,) = [r.getMessage() for r in caplog.records if "not loaded" in r.getMessage()]
    with zipfile.ZipFile(saved) as archive:
        here = json.loads(archive.read("header.json"))[name]
    assert f"{name} 'elsewhere', here {here!r}" in line


def test_the_source_digest_covers_package_and_passes() -> None:
    covered = artifacts._sources()
    wanted = {
        "hidrop_fx/api.py",
        "hidrop_fx/lowering/layer_body.py",
        "hidrop_fx/runtime/artifacts.py",
    }
    assert {*wanted, "passes/prune.py"} <= covered.keys()


def _never(*args: Any) -> None:
    raise AssertionError("loaded")


def test_a_damaged_file_is_refused(fresh: Any, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(saved.read_bytes()[:-200])
    with pytest.raises(hidrop.HidropError, match="damaged"):
        hidrop.load_compiled(fresh, path)
    path.write_text("{}")
    with pytest.raises(hidrop.HidropError, match="damaged"):
        hidrop.load_compiled(fresh, path)
    with pytest.raises(hidrop.HidropError, match="does not exist"):
        hidrop.load_compiled(fresh, tmp_path / "nowhere")


def test_code_that_pytorch_cannot_read_is_refused(
    fresh: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: None)
    with pytest.raises(hidrop.HidropError, match="PyTorch cannot read"):
        hidrop.load_compiled(fresh, saved)


def test_only_libraries_are_unpacked_from_the_archive(
    fresh: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: object())
    path = altered(saved, tmp_path / "altered")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("libraries/../../evil.so", "")
        archive.writestr("libraries/evil.py", "")
    assert hidrop.load_compiled(fresh, path)
    placed = [file for file in tmp_path.rglob("*") if file.is_file() and file != path]
    assert placed
    for file in placed:
        assert file.suffix == ".so"
        assert file.parent == tmp_path / "cache" / file.name[1:3]


def test_saving_what_cannot_be_saved_is_refused_with_the_reason(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    with pytest.raises(hidrop.HidropError, match="is not compiled"):
        hidrop.save_compiled(tiny_llava(num_layers=2), path)
    with pytest.raises(hidrop.HidropError, match="is not compiled"):
        hidrop.load_compiled(tiny_llava(num_layers=2), path)
    with pytest.raises(hidrop.HidropError, match="nothing is compiled yet"):
        hidrop.save_compiled(fresh, path)
    eager = hidrop.compile(tiny_llava(num_layers=2), SCHEDULE, backend="eager")
    with pytest.raises(hidrop.HidropError, match="backend='eager' generates no code"):
        hidrop.save_compiled(eager, path)
    runtime = runtime_in(fresh)
    runtime.programs.log.finished("a body", "[1]", 0.0)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(hidrop.HidropError, match="caches are off"):
        hidrop.save_compiled(fresh, path)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    with pytest.raises(hidrop.HidropError, match="is no directory"):
        hidrop.save_compiled(fresh, tmp_path / "absent" / "x")
    assert not list(tmp_path.iterdir())


# What makes a warm start quick.


@pytest.fixture
def collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.usefixtures("collector")
def test_the_collector_rests_until_the_last_holder_is_done() -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with collection_paused():
            inside.set()
            done.wait(timeout=10)

    other = threading.Thread(target=hold)
    with contextlib.suppress(KeyError), collection_paused():
        other.start()
        assert inside.wait(timeout=10)
        raise KeyError
    assert not gc.isenabled()
    done.set()
    other.join()
    assert gc.isenabled()


@pytest.mark.usefixtures("collector")
def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


@pytest.mark.usefixtures("collector")
def test_the_collector_rests_while_a_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    import hidrop_fx.runtime.capture_store as store_module

    seen = []
    original = store_module.capture_model
    monkeypatch.setattr(
        store_module,
        "capture_model",
        lambda *given: (seen.append(gc.isenabled()), original(*given))[1],
    )
    model = hidrop.compile(tiny_llava(num_layers=1), "identity", backend="eager")
    with torch.no_grad():
        model(**batch(model, [ROW], padding="left"))
    assert seen == [False]
    assert gc.isenabled()


def test_filled_parts_share_the_buffers_and_are_no_views() -> None:
    model = hidrop.compile(tiny_llava(num_layers=2), SCHEDULE, backend="eager")
    with torch.no_grad():
        cache = model(**batch(model, [ROW], padding="left"), use_cache=True).past_key_values
    for layer, (keys, values) in zip(cache.layers, cache.views(), strict=True):
        for part, buffer in ((keys, layer.keys), (values, layer.values)):
            assert part.shape[2] == layer.filled
            assert part.data_ptr() == buffer.data_ptr()
            assert not part._is_view()


def test_scores_are_fp32_under_autocast() -> None:
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    columns = torch.arange(5)[None]
    plain = attention_scores(query, key, columns, columns[:, -1:], 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention_scores(query, key, columns, columns[:, -1:], 0.3)
    assert torch.equal(plain, cast)
