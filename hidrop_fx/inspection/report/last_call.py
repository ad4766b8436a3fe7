"""Inspect a compiled model: its last call, layer by layer, and what was compiled for it.

    model.generate(**inputs)
    report = hidrop_fx.inspect(model)

An `Inspection` is a snapshot. Its token counts come from the last prompt's layout; FLOPs and KV bytes
are those of `hidrop_fx.planning.plan` for these counts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.inspection.report.programs import (
    body_reports,
    executable_reports,
    programs_of,
    recompiles,
)
from hidrop_fx.inspection.report.records import LayerReport, Totals
from hidrop_fx.inspection.report.row_costs import costs_of_rows
from hidrop_fx.inspection.report.snapshot import Inspection
from hidrop_fx.planning import Costs, Segment, plan
from hidrop_fx.planning.batch_layout import Layout
from hidrop_fx.runtime.deepstack import described_deepstack
from hidrop_fx.runtime.hf.binding import require_runtime
from hidrop_fx.runtime.runtime import Runtime

# Passes whose nodes say something about one layer; every layer has those of the others.
_WORTH_TELLING = ("split_streams", "inject", "prune", "exit_vision", "deepstack", "positions")


def inspect(model: Any) -> Inspection:
    """Report on a compiled model's last call, and on what was compiled for it.

    Raises:
        HidropError: the model is not compiled.
    """
    runtime = require_runtime(
        model, "there is nothing to inspect: call model = hidrop_fx.compile(model, schedule) first"
    )
    return inspected(runtime, type(model).__name__)


def inspected(runtime: Runtime, name: str) -> Inspection:
    """Report on the last call under one schedule of a compiled model.

    Args:
        name: of the model's class.
    """
    about: dict[str, Any] = {
        "model": name,
        "schedule": runtime.schedule,
        "schedules": {p.name: str(p.schedule) for p in runtime.peers if p.name is not None},
        "backend": runtime.options.backend,
        "passes": tuple(rewrite.__name__ for rewrite in runtime.options.passes),
        "deepstack": described_deepstack(runtime.model, runtime.schedule),
        "captures": tuple(
            capture.decoder.seconds for capture in runtime.programs.captures.values()
        ),
        "compiled": tuple(runtime.programs.log.entries),
        "bodies": body_reports(runtime),
        "executables": executable_reports(runtime),
        "recompiles": recompiles(runtime.programs.log.entries),
        "fallbacks": tuple(runtime.programs.log.fallbacks),
    }
    layout = runtime.last_layout
    if layout is None:
        return Inspection(plan=plan(runtime.schedule, runtime.model), row=None, **about)
    rows = costs_of_rows(runtime.model, layout)
    return Inspection(
        plan=rows[0],
        row=0,
        text_tokens=tuple(p.text_tokens for p in rows),
        vision_tokens=tuple(p.total_vision_tokens for p in rows),
        images=tuple(layout.images),
        layers=_layers(runtime, layout, rows[0], row=0),
        totals=_totals(rows),
        identity=_totals([p.identity for p in rows]),
        cache_bytes=runtime.last_cache_bytes,
        **about,
    )


def _layers(
    runtime: Runtime, layout: Layout, row_costs: Costs, row: int
) -> tuple[LayerReport, ...]:
    paths = _region_paths(runtime)
    depth = row_costs.geometry.num_layers
    cached = runtime.last_cache_bytes is not None
    inserted = _inserted(runtime, depth)
    reports = []
    for layer in range(depth):
        planned = row_costs.plan.layers[layer]
        segment = row_costs.plan.segment(planned.query)
        reports.append(
            LayerReport(
                layer=layer,
                region=paths[layer],
                segment=_label(segment),
                tokens=layout.counts[segment.name][row],
                vision_tokens=layout.vision_counts[segment.name][row],
                kv_length=layout.lengths[planned.cache] if cached else None,
                flops=row_costs.layer_flops[layer],
                kv_bytes=row_costs.layer_kv_bytes[layer],
                inserted=inserted[layer],
            )
        )
    return tuple(reports)


def _label(segment: Segment) -> str:
    """Name a segment for readers: "text", "start", "prune 10"."""
    if segment.parent is None:
        return segment.name
    return f"{segment.reason} {segment.start}" if segment.start else "start"


def _inserted(runtime: Runtime, depth: int) -> list[str]:
    """Count the nodes that passes put at each layer of the program that ran last, KV buffers aside."""
    programs = [e.program for e in programs_of(runtime).values() if e.program.kind != "decode"]
    counts: list[Counter[str]] = [Counter() for _ in range(depth)]
    told = (*_WORTH_TELLING, *(rewrite.__name__ for rewrite in runtime.options.passes))
    if programs:
        waiting: Counter[str] = Counter()
        for section in programs[-1].history[-1].sections:
            waiting += Counter(x.origin for x in section.lines if x.origin in told)
            if section.layer is not None:
                counts[section.layer], waiting = waiting, Counter()
    return [", ".join(f"{name} {n}" for name, n in layer.items()) for layer in counts]


def _totals(rows: Sequence[Costs]) -> Totals:
    return Totals(
        token_layers=sum(sum(row.tokens) for row in rows),
        flops=sum(row.flops for row in rows),
        kv_bytes=sum(row.kv_bytes for row in rows),
    )


def _region_paths(runtime: Runtime) -> list[str]:
    capture = next(reversed(runtime.programs.captures.values())).decoder
    named = runtime.model.named_modules()
    prefix = next(
        (f"{path}." for path, module in named if module is text_decoder(runtime.model)), ""
    )
    return [f"{prefix}{capture.layers}.{layer}" for layer in range(capture.num_layers)]
