"""Write `report.html`: one file that shows a compiled model, without server or network.

On top the text and vision stream over depth, with what each event costs and saves; under it every program, any
two stages side by side, layers folded. `page.html`, `page.css` and `page.js` are what it is made of.
"""

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from hidrop_fx.inspection.page.depth import depth
from hidrop_fx.inspection.report.programs import programs_of
from hidrop_fx.inspection.report.snapshot import Inspection
from hidrop_fx.inspection.versions import versions
from hidrop_fx.program.codegen import shape_text, variables
from hidrop_fx.program.history import History, Stage
from hidrop_fx.runtime.runtime import Runtime

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image


def write_page(
    path: "Path",
    runtime: Runtime,
    report: Inspection,
    pictures: "Sequence[Image.Image]" = (),
    calibration: str = "",
) -> None:
    """Write the report of a compiled model.

    Args:
        path: of the file.
        runtime: of the compiled model.
        report: shown as text, and its plan over depth.
        pictures: heat maps to show with it.
        calibration: HTML of a section on what was measured.
    """
    programs = {name: e.program.history for name, e in programs_of(runtime).items()}
    data = {
        "about": _about(report),
        "depth": depth(report.plan),
        "programs": [_program(name, history) for name, history in programs.items()],
        "pictures": [_data_url(picture) for picture in pictures],
        "calibration": calibration,
    }
    path.write_text(_filled(data, report.model), encoding="utf-8")


def _about(report: Inspection) -> dict[str, Any]:
    sample = "last prompt, row 0" if report.called else "a typical sample: nothing was run yet"
    return {
        "model": report.model,
        "schedule": str(report.schedule),
        "backend": report.backend,
        "passes": list(report.passes),
        "sample": sample,
        "images": report.plan.images,
        "compile_seconds": report.compile_seconds,
        "compilations": len(report.compiled),
        "fallbacks": list(report.fallbacks),
        "versions": versions(),
        "inspection": str(report),
    }


class _Numbered:
    """Texts by number, so that what many lines share is written once."""

    def __init__(self) -> None:
        self.entries: dict[Any, int] = {}

    def __call__(self, entry: Any) -> int:
        return self.entries.setdefault(entry, len(self.entries))


def _program(name: str, history: History) -> dict[str, Any]:
    """Return all stages; a line is [text, shape, pass, module, source], each a number in `texts`."""
    texts, lines = _Numbered(), _Numbered()
    stages = []
    for stage in history:
        sections = []
        for section in stage.sections:
            members = [
                lines(tuple(map(texts, (x.text, x.shape, x.origin, x.path, x.source))))
                for x in section.lines
            ]
            shape = section.layer is not None and _shape_of_layer(stage, section.lines)
            same = texts(shape) if shape else -1
            sections.append([section.title, section.layer, same, members])
        stages.append(
            {
                "name": stage.name,
                "options": "".join(f" {k}={v}" for k, v in stage.options.items()).strip(),
                "note": stage.result.note,
                "matched": stage.result.matched,
                "ms": round(stage.milliseconds, 1),
                "nodes": len(stage.graph.nodes),
                "inputs": _inputs(stage),
                "segments": [[s.name, s.start, s.length] for s in stage.segments],
                "sections": sections,
            }
        )
    return {
        "name": name,
        "texts": list(texts.entries),
        "lines": [list(line) for line in lines.entries],
        "stages": stages,
    }


def _inputs(stage: Stage) -> list[list[str]]:
    names = variables(stage.graph)
    return [
        [names[node], shape_text(stage.shapes.get(node), stage.symbols)]
        for node in stage.graph.nodes
        if node.op == "placeholder"
    ]


def _shape_of_layer(stage: Stage, lines: Sequence[Any]) -> str:
    """Return what equal layers have in common: operators, shapes and the passes that made them."""
    return "|".join(f"{_operator(x.text)} {x.shape} {x.origin}" for x in lines)


def _operator(text: str) -> str:
    return text.split(" = ", 1)[1].split("(", 1)[0]


def _data_url(picture: "Image.Image") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _filled(data: dict[str, Any], title: str) -> str:
    parts = resources.files("hidrop_fx.inspection.page")
    page, style, script = (
        parts.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    # "</" would end the script element that holds the data.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    return page.replace("TITLE", title).replace("/*DATA*/", text)
