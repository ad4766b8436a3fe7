"""The Python on the pages in docs/ runs, each page from top to bottom; links lead somewhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import hidrop_fx
from hidrop_fx.demo.pictures import picture, prompt
from tests.support.models import tiny_llava
from tests.support.original_llava import Original
from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def untrained(layers: int = 4) -> dict[str, Any]:
    """A model of some layers with random weights, and its processor."""
    from hidrop_fx.demo.build import build_config, build_processor

    config = build_config()
    config.text_config.num_hidden_layers = layers
    return {
        "model": LlavaForConditionalGeneration(config).eval(),
        "processor": build_processor(),
    }


def deep() -> dict[str, Any]:
    """A model deep enough for the presets, the package with "eager" as its default backend, and a batch."""
    given = untrained(layers=8)
    names = {name: getattr(hidrop_fx, name) for name in hidrop_fx.__all__}
    eager = functools.partial(hidrop_fx.compile, backend="eager")
    hidrop = SimpleNamespace(**{**names, "compile": eager})
    batch = given["processor"](
        images=[picture(0, "test").image], text=prompt("Which word is there?"), return_tensors="pt"
    )
    batch["labels"] = batch["input_ids"].where(
        torch.arange(batch["input_ids"].shape[1]) > 150, -100
    )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {**given, "hidrop": hidrop, "batch": batch, "inputs": inputs}


def original() -> dict[str, Any]:
    """A checkpoint of eight layers in LLaVA's original format, and its vision tower, in this directory."""
    made = Original(Path(), tiny_llava(num_layers=8, image_tokens=576))
    made.write()
    made.checkpoint.rename("llava-v1.5-7b")
    made.tower.rename("clip-vit-large-patch14-336")
    return {}


def drawn() -> dict[str, Any]:
    """A picture, in this directory."""
    picture(0, "test").image.save("picture.png")
    return {}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "calibration": untrained,
    "checkpoints": original,
    "generation": lambda: untrained(layers=8),
    "evaluation": drawn,
    "gpu": lambda: untrained(layers=8),
    "scorers": untrained,
    "quantisation": lambda: untrained(layers=8),
    "serving": deep,
    "training": deep,
}
"""What a page takes for granted: its reader's own model."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "quantisation":
        pytest.importorskip("torchao", reason="torchao, an optional dependency, is not installed")
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    torch.manual_seed(0)
    space = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    space |= GIVEN.get(page.stem, dict)()
    for found in BLOCK.finditer(text):
        line = text[: found.start(1)].count("\n")
        exec(compile("\n" * line + found[1], str(page), "exec"), space)


def test_pages_with_code_are_found() -> None:
    with_code = {page.stem for page in PAGES if BLOCK.search(page.read_text())}
    assert with_code == {
        *(
            "quick-start",
            "concepts",
            "schedules",
            "passes",
            "scorers",
            "methods",
            "debugging",
            "model-families",
            "limits",
            "gpu",
            "generation",
            "evaluation",
        ),
        *("calibration", "checkpoints", "quantisation", "scale-out", "serving", "training"),
    }


def test_the_table_of_scorers_is_the_registry() -> None:
    from hidrop_fx.methods import SCORERS

    text = (ROOT / "docs/scorers.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)(?:\(.*?\))?` \| (.*) \| (.*)\|$", text.split("## ")[0], re.MULTILINE
    )[1:]
    built_in = {name: s for name, s in SCORERS.items() if "hidrop_fx" in s.function.__module__}
    assert [name for name, *_ in rows] == list(built_in)
    for name, summary, needs in rows:
        assert summary == built_in[name].description
        assert {*needs.strip().split(", ")} - {""} == built_in[name].needs


TOP_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", [*PAGES, *TOP_PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_paths_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:hidrop_fx|passes|tests|benchmarks)/[\w/.]*)`", text)
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_tests_named_beside_modes_of_generate_exist() -> None:
    named = re.findall(r"`([\w/]+/test_\w+\.py)`", (ROOT / "docs/generation.md").read_text())
    assert len(named) > 15
    for path in named:
        assert (ROOT / "tests" / path).exists(), path


def test_every_folder_of_the_package_is_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = [path.parent for path in (ROOT / "hidrop_fx").glob("*/__init__.py")]
    for folder in folders:
        path = "passes" if folder.name == "passes" else f"hidrop_fx/{folder.name}"
        assert f"`{path}/`" in text


def test_commands_of_the_docs_exist() -> None:
    from hidrop_fx.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}  # type: ignore[union-attr]
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for command in re.findall(r"^hidrop ([\w-]+)", block, re.MULTILINE):
                assert command in commands
