"""Importing `hidrop_fx`: public names load on use, and quick commands load no heavy package."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import hidrop_fx
from hidrop_fx.demo import MODEL_DIR

HEAVY = {"torch", "transformers", "numpy", "PIL"}


def loaded_by(code: str) -> set[str]:
    """Return the heavy packages in `sys.modules` after a fresh interpreter ran the code."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted(set(sys.modules) & {HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(found)


def command(*arguments: str) -> str:
    return f"from hidrop_fx.cli import app\napp({list(arguments)!r}, standalone_mode=False)"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("plan", "--help"),
        ("run", "--help"),
        ("plan", "--schedule", "hidrop-64"),
        ("plan", "--schedule", "inject=3,prune=5:48,exit=9", "--num-layers", "12", "--json"),
        ("plan", "--schedule", "hidrop-64", "--model", "MODEL_DIR"),
    ],
    ids=" ".join,
)
def test_quick_commands_load_no_heavy_package(arguments: tuple[str, ...]) -> None:
    given = [str(MODEL_DIR) if word == "MODEL_DIR" else word for word in arguments]
    assert loaded_by(command(*given)) == set()


def test_import_and_planning_load_no_heavy_package() -> None:
    assert loaded_by("import hidrop_fx\ndir(hidrop_fx)\nhidrop_fx.Schedule(exit=3)") == set()
    sizes = "num_layers=4, hidden_size=64, intermediate_size=96, vision_tokens=9"
    assert loaded_by(f"import hidrop_fx\nhidrop_fx.plan('exit=3', {sizes})") == set()
    assert "torch" in loaded_by("import hidrop_fx\nhidrop_fx.compile")


def test_lazy_names_are_the_imports_that_type_checkers_see() -> None:
    tree = ast.parse(Path(hidrop_fx.__file__).read_text())
    imports = {
        alias.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports == hidrop_fx._MODULES
    assert {*imports, "__version__"} == set(hidrop_fx.__all__)


def test_every_public_name_resolves_to_its_module_attribute() -> None:
    space: dict[str, object] = {}
    exec("from hidrop_fx import *", space)
    for name, module in hidrop_fx._MODULES.items():
        assert space[name] is getattr(importlib.import_module(module), name)
        assert name in dir(hidrop_fx)


def test_no_submodule_bears_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(hidrop_fx.__path__)}
    assert not modules & set(hidrop_fx.__all__)


def test_submodules_are_attributes_and_others_are_not() -> None:
    assert hidrop_fx.schedule.Schedule is hidrop_fx.Schedule
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        _ = hidrop_fx.nosuch


def test_public_objects_survive_pickling() -> None:
    schedule = hidrop_fx.Schedule.preset("hidrop-64")
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    for public in (hidrop_fx.compile, hidrop_fx.Plan, hidrop_fx.ScheduleError):
        assert pickle.loads(pickle.dumps(public)) is public
