"""`report.html`: one file that shows a compiled model, without server or network.

On top the two segments over depth, with what each event costs and saves; under it every program, any
two stages side by side, layers folded. `page.html`, `page.css` and `page.js` are what it is made of.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from hidrop_fx.inspection.report.inspection import Inspection
from hidrop_fx.inspection.report.last_call import programs_of
from hidrop_fx.inspection.versions import versions
from hidrop_fx.planning import Costs, Event, plan
from hidrop_fx.program.codegen import shape_text, variables
from hidrop_fx.program.history import History, Stage
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.schedule import Schedule

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
        pictures: heat maps to show with it. calibration: HTML of a section on what was measured.
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


def depth(row: Costs) -> dict[str, Any]:
    """What happens from layer to layer, and what each event costs and saves."""
    whole = row.identity
    return {
        "text": row.text_tokens,
        "vision": list(row.vision_tokens),
        "flops": list(row.layer_flops),
        "kv": list(row.layer_kv_bytes),
        "identity_tokens": whole.tokens[0],
        "identity_flops": list(whole.layer_flops),
        "identity_kv": list(whole.layer_kv_bytes),
        "totals": {
            "flops": [row.flops, whole.flops],
            "kv": [row.kv_bytes, whole.kv_bytes],
            "tokens": [sum(row.tokens), sum(whole.tokens)],
        },
        "events": [_event(row, event) for event in row.plan.events if event.layer or event.keep],
    }


def _event(row: Costs, event: Event) -> dict[str, Any]:
    """Compare an event with the same schedule without it."""
    schedule, layer = row.schedule, event.layer
    changes: dict[str, Any] = {
        "inject": {"inject": 0},
        "prune": {"prune": {k: n for k, n in schedule.prune.items() if k != layer}},
        "exit": {"exit": None},
    }
    without = _with_schedule(row, replace(schedule, **changes[event.kind]))
    parent = row.plan.opened_by(event).parent
    assert parent is not None
    return {
        "layer": layer,
        "reason": event.kind,
        "before": row.segment_vision_tokens[parent],
        "after": row.vision_tokens[layer],
        "cost": row.event_flops[event.name],
        "saved_flops": without.flops - row.flops,
        "saved_kv": without.kv_bytes - row.kv_bytes,
    }


def _with_schedule(row: Costs, schedule: Schedule) -> Costs:
    g = row.geometry
    return plan(
        schedule,
        num_layers=g.num_layers,
        hidden_size=g.hidden_size,
        intermediate_size=g.intermediate_size,
        num_attention_heads=g.num_attention_heads,
        num_key_value_heads=g.num_key_value_heads,
        head_dim=g.head_dim,
        vocab_size=g.vocab_size,
        dtype_bytes=g.dtype_bytes,
        text_tokens=row.text_tokens,
        vision_tokens=row.total_vision_tokens,
        images=row.images,
        batch_size=row.batch_size,
        new_tokens=row.new_tokens,
    )


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


class _Table:
    """Texts by number, so that what many lines share is written once."""

    def __init__(self) -> None:
        self.entries: dict[Any, int] = {}

    def __call__(self, entry: Any) -> int:
        return self.entries.setdefault(entry, len(self.entries))


def _program(name: str, history: History) -> dict[str, Any]:
    """All stages; a line is [text, shape, pass, module, source], each a number in `texts`."""
    texts, lines = _Table(), _Table()
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
    """What equal layers have in common: operators, shapes and the passes that made them."""
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
