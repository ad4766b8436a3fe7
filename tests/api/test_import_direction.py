"""Imports between the folders run one way, modules import in no circle, and none hides a public function."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import hidrop_fx
import hidrop_fx.passes

FOLDERS = {
    "hidrop_fx": Path(hidrop_fx.__file__).parent,
    "hidrop_fx.passes": Path(hidrop_fx.passes.__file__).parent,
}
ORDER = (
    *(
        "errors",
        "version",
        "surroundings",
        "ops",
        "methods",
        "schedule",
        "planning",
        "capture",
        "program",
    ),
    *("passes", "pipeline", "lowering", "distributed", "models", "training"),
    "checkpoints",
    *("options", "runtime"),
    *("reference", "inspection", "analysis", "api", "demo", "evaluation", "cli", "__main__"),
)
"""Every folder and top module; each imports those before it alone."""
WITH_TRANSFORMERS = {
    *(
        "capture",
        "checkpoints",
        "runtime",
        "models",
        "reference",
        "inspection",
        "analysis",
        "evaluation",
        "demo",
    ),
}
"""The folders that may import transformers."""
QUIETENED = "hidrop_fx.cli.application"  # turns its progress bars off
FUNCTIONS = (
    *("plan", "inspect", "explain", "compare", "dump", "replay", "heatmap", "measure"),
    *("compile", "restore", "save", "load", "warmup", "calibrate", "use"),
)


def modules() -> dict[str, Path]:
    """Return the path of every module of the package, by its full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "hidrop_fx" and parts[0] == "passes":
                continue  # a link in a checkout
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def imports(path: Path, *, types: bool = False) -> Iterator[str]:
    """Yield the package's modules that a file imports, anywhere in it; for types alone too if asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if types else statements(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                name = whole if whole in MODULES else node.module
                if name in MODULES:
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(node)


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def test_imports_between_folders_run_one_way() -> None:
    back = [
        f"{module} -> {imported}"
        for module, path in MODULES.items()
        if module != "hidrop_fx"
        for imported in imports(path, types=True)
        if imported != "hidrop_fx" and place(imported) > place(module)
    ]
    assert back == []


def test_modules_import_in_no_circle() -> None:
    graph = {
        module: set(imports(path)) - {module, "hidrop_fx"}
        for module, path in MODULES.items()
        if module != "hidrop_fx"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_few_folders_import_transformers() -> None:
    found = [
        module
        for module, path in MODULES.items()
        if module.split(".")[1:] and module.split(".")[1] not in WITH_TRANSFORMERS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if any(name.split(".")[0] == "transformers" for name in _names(node))
    ]
    assert found == [QUIETENED]


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_programs_are_made_without_transformers() -> None:
    """What lies below the runtime gets along without it, through all that it imports."""
    below = ("methods", "schedule", "planning", "program", "passes", "pipeline", "lowering")
    names = [m for m in MODULES if m.startswith(tuple(f"hidrop_fx.{folder}" for folder in below))]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'transformers')[:3])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_module_hides_a_public_function() -> None:
    """A module of that name would take the function's place as soon as it is imported."""
    packages = ("hidrop_fx", "hidrop_fx.inspection", "hidrop_fx.analysis")
    hiding = [f"{package}.{name}" for package in packages for name in FUNCTIONS]
    assert [name for name in hiding if name in MODULES] == []
