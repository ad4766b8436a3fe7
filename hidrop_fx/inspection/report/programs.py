"""Programs and bodies that a compiled model has so far, by name."""

import re
from collections import Counter
from collections.abc import Sequence

from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.placement import home
from hidrop_fx.inspection.report.ranges import ranges
from hidrop_fx.inspection.report.records import BodyReport, ExecutableReport
from hidrop_fx.lowering.compile_log import CompileEntry
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.lowering.layer_body import Body
from hidrop_fx.runtime.runtime import Runtime


def bodies_of(runtime: Runtime) -> list[Body]:
    """Return every body that was made so far, in the order in which programs were made."""
    executables = [e for c in runtime.programs.captures.values() for e in c.executables.values()]
    return list({id(body): body for e in executables for body in e.bodies.values()}.values())


def programs_of(runtime: Runtime) -> dict[str, Executable]:
    """Return every executable that was made so far, by a name that tells its variant: "prefill", "decode-masked"."""
    found: dict[str, Executable] = {}
    for capture in runtime.programs.captures.values():
        for executable in capture.executables.values():
            name = wanted = executable.program.name
            number = 2
            while name in found:
                name, number = f"{wanted}-{number}", number + 1
            found[name] = executable
    return found


def body_reports(runtime: Runtime) -> tuple[BodyReport, ...]:
    """Report on every body, with the layers that it serves."""
    variants: dict[int, str] = {}
    for capture in runtime.programs.captures.values():
        for (_, variant), executable in capture.executables.items():
            # A body that is a whole program is told apart by what the program was made for.
            parts = (
                ", masked" * variant.masked,
                ", windows" * bool(variant.masks),
                ", differentiable" * variant.differentiable,
            )
            told = "".join(parts)
            variants |= {id(body): told for body in executable.bodies.values()}
    return tuple(
        BodyReport(name=body.name, serves=_serves(body, variants[id(body)]))
        for body in bodies_of(runtime)
    )


def _serves(body: Body, variant: str) -> str:
    """Gather names such as "prefill layer_0": "prefill layers 0-7, 11"."""
    groups: dict[str, set[int]] = {}
    for name in body.used_by:
        found = re.fullmatch(r"(.+)_(\d+)", name)
        numbers = groups.setdefault(found[1] if found else name + variant, set())
        if found:
            numbers.add(int(found[2]))
    return "; ".join(
        f"{name}{'s' if len(numbers) > 1 else ''} {ranges(sorted(numbers))}".rstrip()
        for name, numbers in groups.items()
    )


def executable_reports(runtime: Runtime) -> tuple[ExecutableReport, ...]:
    """Report on every executable: calls, bodies, seconds of compilation, recordings."""
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
    device = home(text_decoder(runtime.model)).type
    placement = runtime.programs.store.placement
    if placement is not None:
        return f"no: the text decoder {placement}"
    if runtime.graphs is None:
        why = "cuda_graphs=True was not given" if device == "cuda" else f"the model is on {device}"
        return f"no: {why}"
    recorded = sum(key[0] == id(executable) for key in runtime.graphs.entries)
    plain = "" if device == "cuda" else f", as plain calls on {device}"
    return f"{recorded} recorded{plain}"


def recompiles(entries: Sequence[CompileEntry]) -> tuple[str, ...]:
    """Tell every compilation of a body after its first, and the reason."""
    first: dict[str, list[str]] = {}
    found = []
    for entry in entries:
        if entry.name.endswith(" graph"):  # recorded once for each set of shapes, as they should be
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
