"""`hidrop import-llava`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hidrop_fx.cli import app
from tests.support.models import tiny_llava
from tests.support.original_llava import Original


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["import-llava", *map(str, arguments)])


@pytest.fixture
def original(tmp_path: Path) -> Original:
    made = Original(tmp_path, tiny_llava())
    made.write()
    return made


def test_what_is_written_is_printed(original: Original, tmp_path: Path) -> None:
    output = tmp_path / "made"
    options = ("--vision-tower", original.tower, "--output", output)
    schedule = "inject=1,prune=2:4,exit=3"
    result = invoke(original.checkpoint, *options, "--schedule", schedule)
    assert result.exit_code == 0, result.output
    assert f"written   {output} (0.00 B parameters)" in result.stdout
    assert f"schedule  {schedule}" in result.stdout
    assert "vicuna_v1" in result.stdout
    assert "reading model.safetensors (1 of 2)" in result.stderr
    assert (output / "hidrop.json").exists()
    result = invoke(original.checkpoint, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: output=")


def test_json_and_adapters(tmp_path: Path) -> None:
    original = Original(tmp_path, tiny_llava())
    original.write_adapters({}, original.projector)
    options = ("--vision-tower", original.tower, "--output", tmp_path / "made", "--json")
    failed = invoke(original.checkpoint, *options)
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert "pass the directory of the model" in failed.stderr
    result = invoke(original.checkpoint, *options, "--base", original.base, "--dtype", "bfloat16")
    found = json.loads(result.stdout)
    assert found["vocab_size"] == 128
    assert found["schedule"] is None
    assert found["directory"] == str(tmp_path / "made")


def test_help_has_an_example() -> None:
    assert "Example: hidrop import-llava llava-v1.5-7b --vision-tower" in invoke("--help").stdout
