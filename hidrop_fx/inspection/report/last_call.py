"""What a compiled model did in its last call, layer by layer, and what was compiled for it.

    model.generate(**inputs)
    report = hidrop_fx.inspect(model)

An `Inspection` is a snapshot. Its token counts come from the last prompt's layout; FLOPs and KV bytes
are those of `hidrop_fx.planning.plan` for these counts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from hidrop_fx.errors import HidropError
from hidrop_fx.inspection.report.inspection import (
    BodyReport,
    ExecutableReport,
    Inspection,
    LayerReport,
    Totals,
)
from hidrop_fx.lowering.body import Body
from hidrop_fx.lowering.compile_log import CompileEntry
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.planning import Costs, plan
from hidrop_fx.planning.layout import Layout
from hidrop_fx.program.program import Program
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.schedule import Schedule

# Passes whose nodes say something about one layer; every layer has those of the others.
_WORTH_TELLING = ("split_streams", "inject", "prune", "exit_vision", "positions")


def inspect(model: Any) -> Inspection:
    """Report on a compiled model's last call, and on what was compiled for it.

    Raises:
        HidropError: the model is not compiled.
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise HidropError(
            f"this {type(model).__name__} is not compiled, so there is nothing to inspect; call "
            "model = hidrop_fx.compile(model, schedule) first"
        )
    about: dict[str, Any] = {
        "model": type(model).__name__,
        "schedule": runtime.schedule,
        "backend": runtime.options.backend,
        "passes": tuple(rewrite.__name__ for rewrite in runtime.options.passes),
        "captures": tuple(
            capture.decoder.seconds for capture in runtime.programs.captures.values()
        ),
        "compiled": tuple(runtime.programs.log.entries),
        "bodies": _body_reports(runtime),
        "executables": _executables(runtime),
        "recompiles": _recompiles(runtime.programs.log.entries),
        "fallbacks": tuple(runtime.programs.log.fallbacks),
    }
    layout = runtime.last_layout
    if layout is None:
        return Inspection(plan=plan(runtime.schedule, runtime.model), row=None, **about)
    plans = _plans_of_rows(runtime, layout)
    return Inspection(
        plan=plans[0],
        row=0,
        text_tokens=tuple(p.text_tokens for p in plans),
        vision_tokens=tuple(p.total_vision_tokens for p in plans),
        images=tuple(layout.images),
        layers=_layers(runtime, layout, plans[0], row=0),
        totals=_totals(plans),
        identity=_totals([p.identity for p in plans]),
        cache_bytes=runtime.last_cache_bytes,
        **about,
    )


def bodies_of(runtime: Runtime) -> list[Body]:
    """Every body that was made so far, in the order in which programs were made."""
    executables = [e for c in runtime.programs.captures.values() for e in c.executables.values()]
    return list({id(body): body for e in executables for body in e.bodies.values()}.values())


def programs_of(runtime: Runtime) -> dict[str, Executable]:
    """Every executable that was made so far, by a name that tells its variant: "prefill", "decode-masked"."""
    found: dict[str, Executable] = {}
    for capture in runtime.programs.captures.values():
        for executable in capture.executables.values():
            name = wanted = program_name(executable.program)
            number = 2
            while name in found:
                name, number = f"{wanted}-{number}", number + 1
            found[name] = executable
    return found


def program_name(program: Program) -> str:
    """What a program is called in dumps: its kind, and what tells it from others of its kind."""
    options: dict[str, Any] = {}
    for stage in program.history:
        options |= stage.options
    usual = (
        program.kind == "prefill"
    )  # prefill alone returns the last rows only, unless told otherwise
    parts: list[str] = [program.kind]
    if bool(options.get("chosen")) != usual:
        parts.append("all" if usual else "chosen")
    parts += ["windows"] * bool(options.get("masks")) + ["masked"] * bool(options.get("masked"))
    return "-".join(parts)


def runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """(first, last, value) of each run of equal neighbours: [5, 5, 7] -> [(0, 1, 5), (2, 2, 7)]."""
    found: list[tuple[int, int, Any]] = []
    for index, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], index, value)
        else:
            found.append((index, index, value))
    return found


def _plans_of_rows(runtime: Runtime, layout: Layout) -> list[Costs]:
    injected = f"inject_{runtime.schedule.inject}"

    @lru_cache
    def plan_of(schedule: Schedule, text: int, vision: int, images: int) -> Costs:
        return plan(schedule, runtime.model, text_tokens=text, vision_tokens=vision, images=images)

    learned = runtime.ratios is not None
    plans = []
    for row, images in enumerate(layout.images):
        tokens = layout.counts["text"][row], layout.vision_counts[injected][row]
        if learned:
            plans.append(plan_of(as_it_ran(runtime.schedule, layout, row), *tokens, images=1))
        else:
            plans.append(plan_of(runtime.schedule, *tokens, images=images))
    return plans


def as_it_ran(schedule: Schedule, layout: Layout, row: int) -> Schedule:
    """A schedule with the counts that its learned ratios came to in this row."""
    counts = {k: layout.vision_counts[f"prune_{k}"][row] for k in schedule.prune}
    return schedule.with_keeps({k: max(1, count) for k, count in counts.items()})


def _layers(runtime: Runtime, layout: Layout, row_plan: Costs, row: int) -> tuple[LayerReport, ...]:
    paths = _region_paths(runtime)
    depth = row_plan.geometry.num_layers
    cached = runtime.last_cache_bytes is not None
    inserted = _inserted(runtime, depth)
    reports = []
    for layer in range(depth):
        segment = row_plan.plan.layers[layer].query
        reports.append(
            LayerReport(
                layer=layer,
                region=paths[layer],
                segment="start" if segment == "inject_0" else segment.replace("_", " "),
                tokens=layout.counts[segment][row],
                vision_tokens=layout.vision_counts[segment][row],
                kv_length=layout.lengths[segment] if cached else None,
                flops=row_plan.layer_flops[layer],
                kv_bytes=row_plan.layer_kv_bytes[layer],
                inserted=inserted[layer],
            )
        )
    return tuple(reports)


def _inserted(runtime: Runtime, depth: int) -> list[str]:
    """What passes put at each layer of the program that ran last, its KV buffers aside."""
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


def _executables(runtime: Runtime) -> tuple[ExecutableReport, ...]:
    seconds: Counter[str] = Counter()
    for entry in runtime.programs.log.entries:
        seconds[entry.name] += entry.seconds or 0.0  # type: ignore[assignment]
    return tuple(
        ExecutableReport(
            name=name,
            serves="every length; batch 1 and larger ones compiled apart",
            calls=executable.calls,
            bodies=len(executable.bodies),
            seconds=float(sum(seconds[body.name] for body in executable.bodies.values())),
            cuda_graph=_cuda_graph(runtime, executable),
        )
        for name, executable in programs_of(runtime).items()
    )


def _cuda_graph(runtime: Runtime, executable: Executable) -> str:
    device = runtime.model.device.type
    if runtime.graphs is None:
        why = "cuda_graphs=True was not given" if device == "cuda" else f"the model is on {device}"
        return f"no: {why}"
    recorded = sum(key[0] == id(executable) for key in runtime.graphs.entries)
    plain = "" if device == "cuda" else f", as plain calls on {device}"
    return f"{recorded} recorded{plain}"


def _recompiles(entries: Sequence[CompileEntry]) -> tuple[str, ...]:
    first: dict[str, list[str]] = {}
    found = []
    for entry in entries:
        if entry.name.endswith(" graph"):  # recorded once a entry of shapes, as they should
            continue
        known = first.setdefault(entry.name, [])
        if known:
            reason = (
                "sizes of one are compiled apart from larger ones"
                if entry.shapes not in known
                else "grad mode, autocast or what requires a gradient had changed"
            )
            found.append(f"{entry.name} for {entry.shapes}, after {known[-1]}: {reason}")
        known.append(entry.shapes)
    return tuple(found)


def _totals(plans: Iterable[Costs]) -> Totals:
    plans = list(plans)
    return Totals(
        token_layers=sum(sum(p.tokens) for p in plans),
        flops=sum(p.flops for p in plans),
        kv_bytes=sum(p.kv_bytes for p in plans),
    )


def _region_paths(runtime: Runtime) -> list[str]:
    capture = next(reversed(runtime.programs.captures.values())).decoder
    named = runtime.model.named_modules()
    prefix = next(
        (f"{path}." for path, module in named if module is runtime.model.get_decoder()), ""
    )
    return [f"{prefix}{capture.layers}.{layer}" for layer in range(capture.num_layers)]


def _body_reports(runtime: Runtime) -> tuple[BodyReport, ...]:
    variants: dict[int, str] = {}
    for capture in runtime.programs.captures.values():
        for (_, variant), executable in capture.executables.items():
            # A body that is a whole program is told apart by what the program was made for.
            told = "".join([", masked" * variant.masked, ", windows" * bool(variant.masks)])
            variants |= {id(body): told for body in executable.bodies.values()}
    return tuple(
        BodyReport(name=body.name, serves=_serves(body, variants[id(body)]))
        for body in bodies_of(runtime)
    )


def _serves(body: Body, variant: str) -> str:
    """Names such as "prefill layer_0", gathered: "prefill layers 0-7, 11"."""
    groups: dict[str, set[int]] = {}
    for name in body.used_by:
        found = re.fullmatch(r"(.+)_(\d+)", name)
        numbers = groups.setdefault(found[1] if found else name + variant, set())
        if found:
            numbers.add(int(found[2]))
    return "; ".join(_gathered(name, sorted(numbers)) for name, numbers in groups.items())


def _gathered(name: str, numbers: list[int]) -> str:
    if not numbers:
        return name
    # Neighbours differ from their index by the same amount.
    ranges = [(numbers[a], numbers[b]) for a, b, _ in runs([n - i for i, n in enumerate(numbers)])]
    spans = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
    return f"{name}{'s' if len(numbers) > 1 else ''} {spans}"
