"""Tables of an inspection, built from its records."""

from collections.abc import Sequence

from hidrop_fx.inspection.report.records import BodyReport, ExecutableReport, LayerReport, Totals
from hidrop_fx.inspection.table import Table, amount, plural, ratio, size
from hidrop_fx.lowering.compile_log import CompileEntry


def layers(
    reports: Sequence[LayerReport],
    text_tokens: Sequence[int],
    vision_tokens: Sequence[int],
    *,
    row: int,
    images: int,
) -> Table:
    """Build the table of all layers for one row of a batch.

    Args:
        reports: of that row.
        text_tokens: by row.
        vision_tokens: by row, before anything is pruned.
        row: the row shown.
        images: of that row.
    """
    count = len(text_tokens)
    sample = (
        f"{text_tokens[row]} text + {vision_tokens[row]} vision tokens, {plural(images, 'image')}"
    )
    title = f"Last prompt: {sample}"
    notes = []
    if count > 1:
        title = f"Last prompt, row {row} of {count} rows (0 to {count - 1}): {sample}"
        each = ", ".join(
            f"{text}+{vision}" for text, vision in zip(text_tokens, vision_tokens, strict=True)
        )
        notes.append(f"text + vision tokens of each row: {each}")
        notes.append("KV length is the same for all rows; shorter rows are padded in it")
    return Table(
        title=title,
        columns=(
            *("layer", "<region", "<stream", "<nodes inserted", "tokens", "vision"),
            *("KV length", "KV", "FLOPs"),
        ),
        rows=tuple(_layer(report) for report in reports),
        notes=tuple(notes),
    )


def totals(ours: Totals, identity: Totals, rows: int, cache_bytes: int | None) -> Table:
    """Build the table of sums over all layers and rows, beside those of the untouched model."""
    cells = (
        (
            "tokens, summed over layers",
            str(ours.token_layers),
            str(identity.token_layers),
            ratio(identity.token_layers, ours.token_layers),
        ),
        (
            "prefill FLOPs, output head included",
            amount(ours.flops),
            amount(identity.flops),
            ratio(identity.flops, ours.flops),
        ),
        (
            "KV of the prompt's tokens",
            size(ours.kv_bytes),
            size(identity.kv_bytes),
            ratio(identity.kv_bytes, ours.kv_bytes),
        ),
    )
    note = "no KV cache in use"
    if cache_bytes is not None:
        note = (
            f"buffers of the last KV cache: {size(cache_bytes)}, padding and room for new "
            "tokens included"
        )
    return Table(
        title="Totals" if rows == 1 else f"Totals of all {rows} rows",
        columns=("<", "schedule", "identity", "ratio"),
        rows=cells,
        notes=(note,),
    )


def captures(seconds: Sequence[float]) -> Table:
    """Build the table of captures of the decoder, by the seconds each took."""
    listed = ", ".join(f"{s:.1f} s" for s in seconds)
    times = plural(len(seconds), "time")
    return Table(title="Capture", notes=(f"decoder captured {times}: {listed}",))


def executables(reports: Sequence[ExecutableReport]) -> Table:
    """Build the table of programs that can be called."""
    return Table(
        title="Executables",
        columns=("<program", "<serves", "calls", "bodies", "compiled", "<CUDA graph"),
        rows=tuple(
            (e.name, e.serves, str(e.calls), str(e.bodies), f"{e.seconds:.1f} s", e.cuda_graph)
            for e in reports
        ),
    )


def bodies(reports: Sequence[BodyReport]) -> Table:
    """Build the table of compiled functions and the layers that they serve."""
    return Table(
        title="Bodies",
        columns=("<body", "<serves"),
        rows=tuple((body.name, body.serves) for body in reports),
    )


def compiled(entries: Sequence[CompileEntry], backend: str) -> Table:
    """Build the table of compilations so far."""
    if not entries:
        reason = "the eager backend compiles nothing" if backend == "eager" else "nothing"
        return Table(title="Compiled", notes=(reason,))
    seconds = sum(entry.seconds or 0.0 for entry in entries)
    return Table(
        title="Compiled",
        columns=("<body", "<first input", "seconds"),
        rows=tuple((e.name, e.shapes, f"{e.seconds:.1f}") for e in entries),
        notes=(f"{plural(len(entries), 'compilation')}, {seconds:.1f} s in all",),
    )


def _layer(report: LayerReport) -> tuple[str, ...]:
    return (
        str(report.layer),
        report.region,
        report.segment,
        report.inserted,
        str(report.tokens),
        str(report.vision_tokens),
        "-" if report.kv_length is None else str(report.kv_length),
        "-" if report.kv_length is None else size(report.kv_bytes),
        amount(report.flops),
    )
