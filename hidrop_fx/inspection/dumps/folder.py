"""Dump a compiled model into a folder: programs, plan and report, without its weights.

hidrop_fx.dump(model, "dump")
HIDROP_DEBUG=dump python serve.py      # the same, for every program that the process makes

dump/README.txt  report.html  schedule.json  plan.json  inspection.json  inspection.txt  versions.json
dump/prefill/00_captured.py  01_split_streams.py  01_split_streams.diff ...  graph.json
dump/output_code/prefill_layer_body_1.py ...
"""

import atexit
import itertools
import json
import logging
import operator
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx, nn

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.dumps.stage_files import write_stage
from hidrop_fx.inspection.page.html import write_page
from hidrop_fx.inspection.report.last_call import inspected
from hidrop_fx.inspection.report.programs import bodies_of, programs_of
from hidrop_fx.inspection.versions import versions
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.passes.branch import PREFIX
from hidrop_fx.program.codegen import statements
from hidrop_fx.program.history import Stage
from hidrop_fx.program.program import Program
from hidrop_fx.program.variant import Variant
from hidrop_fx.runtime.hf.binding import require_runtime, runtime_of
from hidrop_fx.runtime.runtime import Runtime

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("hidrop_fx")

CONSTANTS = "constants.pt"

_README = """This folder was written by hidrop_fx {version} for a compiled {model}.
It holds graphs, shapes and module paths, no weights and no inputs: it can be attached to an issue.

  schedule   {schedule}
  backend    {backend}
  passes     {passes}

report.html        open it in a browser: tokens over depth, and the programs before and after every pass
inspection.txt     what hidrop_fx.inspect(model) prints; inspection.json the same as data
schedule.json      plan.json, versions.json
NAME/NN_PASS.py    the program NAME after each pass; NN_PASS.diff what the pass changed
NAME/graph.json    its last stage: nodes, module paths, shapes, and the pass that made each
output_code/       what Inductor generated, where it compiled anything

To reproduce, with the same model and prompt:

  import hidrop_fx as hidrop
  model = hidrop.compile(model, "{name}/schedule.json", backend={backend!r})
  print(hidrop.compare(model, **inputs))            # from which layer on is it wrong?
  print(hidrop.replay("{name}", model, **inputs))   # after which pass?

A stage file may be edited before it is replayed.
"""


class HtmlReport(Protocol):
    """A report that can become a section of the page, e.g. a `Calibration`."""

    def to_html(self) -> str:
        """Return HTML without styles of its own."""


def dump(
    model: Any,
    directory: str | Path,
    *,
    pictures: Sequence["Image"] = (),
    calibration: HtmlReport | None = None,
) -> Path:
    """Write a compiled model's programs, plan and report into a directory, and return it.

    A model that was not called yet gets its prefill and decode programs made, not compiled. Files of an
    earlier dump are overwritten.

    Args:
        model: a compiled model.
        directory: made if it is missing.
        pictures: shown in the report, e.g. those of `heatmap`. They show the input images.
        calibration: what `calibrate` returned: its tables and curves become a section of the report.

    Raises:
        HidropError: the model is not compiled, or the directory cannot be written.
    """
    runtime = require_runtime(
        model, "there is nothing to dump: call model = hidrop_fx.compile(model, schedule) first"
    )
    measured = ""
    if calibration is not None:
        if not callable(getattr(calibration, "to_html", None)):
            raise HidropError(
                f"calibration is a {type(calibration).__name__}; pass what hidrop_fx.calibrate returned"
            )
        measured = calibration.to_html()
    if not programs_of(runtime):
        capture = runtime.programs.capture()
        runtime.programs.executable(capture, "prefill", Variant(output="chosen"))
        runtime.programs.executable(capture, "decode", Variant())
    return _write(runtime, Path(directory), pictures, measured)


_DEBUGGED: "weakref.WeakKeyDictionary[Runtime, Path]" = weakref.WeakKeyDictionary()
_NUMBERS = itertools.count()


def dump_for_debugging(runtime: Runtime, directory: str) -> None:
    """Dump a runtime that has just made a program, and once more, with its output code, at exit."""
    if not _DEBUGGED:
        atexit.register(_dump_again)
    if runtime not in _DEBUGGED:
        name = f"{next(_NUMBERS):02d}_{type(runtime.model).__name__}"
        _DEBUGGED[runtime] = Path(directory) / name
    _write(runtime, _DEBUGGED[runtime])


def _dump_again() -> None:
    for runtime, path in list(_DEBUGGED.items()):
        bound = runtime_of(runtime.model)
        if bound is not None and runtime in bound.peers:
            _write(runtime, path)


def _write(
    runtime: Runtime, directory: Path, pictures: Sequence["Image"] = (), calibration: str = ""
) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        report = inspected(runtime, type(runtime.model).__name__)
        _remove_programs(directory)
        for name, executable in programs_of(runtime).items():
            _write_program(directory / name, executable, text_decoder(runtime.model))
        _write_output_code(directory / "output_code", runtime)
        _json(directory / "schedule.json", report.schedule.to_dict())
        _json(directory / "plan.json", report.plan.to_dict())
        _json(directory / "inspection.json", report.to_dict())
        _json(directory / "versions.json", versions())
        (directory / "inspection.txt").write_text(f"{report}\n", encoding="utf-8")
        (directory / "README.txt").write_text(
            _README.format(
                version=versions()["hidrop_fx"],
                model=report.model,
                schedule=report.schedule,
                backend=report.backend,
                passes=", ".join(report.passes) or "the built-in ones",
                name=directory.name,
            ),
            encoding="utf-8",
        )
        write_page(directory / "report.html", runtime, report, pictures, calibration)
    except OSError as error:
        raise HidropError(f"cannot write the dump to {directory}: {error}") from error
    logger.info("dumped %d programs to %s", len(programs_of(runtime)), directory)
    return directory


def _remove_programs(directory: Path) -> None:
    """Remove the programs of an earlier dump, and nothing else."""
    for folder in [path.parent for path in directory.glob("*/00_captured.py")]:
        stages = (*folder.glob("[0-9][0-9]_*.py"), *folder.glob("[0-9][0-9]_*.diff"))
        for path in (*stages, folder / "graph.json", folder / CONSTANTS):
            path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    _remove_output_code(directory / "output_code")


def _remove_output_code(folder: Path) -> None:
    """Remove generated code, which would else be taken for that of the programs there are now."""
    for path in folder.glob("*.py"):
        if path.name.startswith(("prefill_", "decode_", "train_")):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write_program(directory: Path, executable: Executable, decoder: nn.Module) -> None:
    directory.mkdir(exist_ok=True)
    program, history = executable.program, executable.program.history
    for index, stage in enumerate(history):
        write_stage(directory / f"{index:02d}_{stage.name}.py", stage, index)
        if index:
            changed = history.diff(index - 1, index)
            path = directory / f"{index:02d}_{stage.name}.diff"
            path.write_text(f"{changed}\n", encoding="utf-8")
    _json(directory / "graph.json", _graph(program))
    constants = dict(_constants(program, decoder))
    if constants:
        torch.save(constants, directory / CONSTANTS)


def _graph(program: Program) -> dict[str, Any]:
    stage = program.history[-1]
    lines = statements(stage.graph, stage.shapes, stage.origins, stage.symbols)
    return {
        "kind": program.kind,
        "inputs": program.inputs,
        "segments": [
            {"name": s.name, "start": s.start, "length": s.length, "columns": s.columns}
            for s in stage.segments
        ],
        "layers": [
            {"layer": layer, "path": path, "live_out": node}
            for layer, (path, node) in enumerate(zip(stage.paths, stage.live_outs, strict=True))
        ],
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "target": _target(node),
                "inputs": [source.name for source in node.all_input_nodes],
                "shape": lines[node].shape if node in lines else "",
                "module": lines[node].path if node in lines else "",
                "layer": stage.layers.get(node.name),
                "pass": stage.origins.get(node.name, "captured"),
                "source": lines[node].source if node in lines else "",
            }
            for node in stage.graph.nodes
        ],
        "passes": [_pass(stage) for stage in program.history],
    }


def _pass(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "options": {name: repr(value) for name, value in stage.options.items()},
        "matched": stage.result.matched,
        "note": stage.result.note,
        "milliseconds": round(stage.milliseconds, 2),
        "nodes": len(stage.graph.nodes),
    }


def _target(node: fx.Node) -> str:
    if isinstance(node.target, (str, torch._ops.OpOverload)):
        return str(node.target)
    return f"{node.target.__module__}.{node.target.__name__}"


def _constants(program: Program, decoder: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors that the model's code made, which a decoder does not hold under their name."""
    for node in program.graph.nodes:
        # Weights of a side branch are the model's too.
        if node.op == "get_attr" and not str(node.target).startswith(PREFIX):
            try:
                operator.attrgetter(str(node.target))(decoder)
            except AttributeError:
                yield str(node.target), operator.attrgetter(str(node.target))(program.module)


def _write_output_code(directory: Path, runtime: Runtime) -> None:
    for body in bodies_of(runtime):
        for index, code in enumerate(body.output_code):
            directory.mkdir(exist_ok=True)
            variant = f"_{index + 1}" if index else ""
            path = directory / f"{body.name.replace(' ', '_')}{variant}.py"
            path.write_text(code, encoding="utf-8")


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
