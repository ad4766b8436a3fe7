"""Render reports as tables: plain text, HTML in a notebook, and rich's on a terminal."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hidrop_fx.inspection.report.inspection import Inspection, LayerReport


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, rows of cells under column heads, and sentences below them."""

    title: str
    columns: tuple[str, ...] = ()
    """Heads; one that starts with "<" is for text, set to the left."""
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


class Report(ABC):
    """A report: `print` shows plain tables, a notebook HTML, `rich.print` those of rich."""

    @property
    @abstractmethod
    def tables(self) -> list[Table]:
        """Tables that are printed."""

    def __str__(self) -> str:
        return as_text(self.tables)

    def _repr_html_(self) -> str:
        return as_html(self.tables)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        return as_rich(self.tables)


def as_text(tables: Sequence[Table]) -> str:
    """Render tables as plain text, columns aligned."""
    return "\n\n".join(_text(table) for table in tables)


def as_html(tables: Sequence[Table]) -> str:
    """Render tables as HTML without styles of its own."""
    return "\n".join(_html(table) for table in tables)


def as_rich(tables: Sequence[Table]) -> Iterator[Any]:
    """Render tables for a `rich` console."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in tables:
        yield Text(table.title, style="bold")
        if table.columns:
            shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
            for head in table.columns:
                left = head.startswith("<")
                name = Text(head.removeprefix("<"))
                shown.add_column(name, justify="left" if left else "right", no_wrap=not left)
            for row in table.rows:
                shown.add_row(*(Text(cell) for cell in row))
            yield Padding(shown, (0, 0, 0, 2), expand=False)
        for note in table.notes:
            yield Padding(Text(note, style="dim" if table.columns else ""), (0, 0, 0, 2))
        if not table.columns:
            yield Text("")


def tables(report: "Inspection") -> list[Table]:
    """What there is to tell of a compiled model."""
    if not report.called:
        return [_heading(report), _plan(report), *_compilation(report)]
    return [_heading(report), _layers(report), _totals(report), *_compilation(report)]


def plural(count: int, noun: str) -> str:
    """Count a noun: `3 images`, `1 image`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def amount(number: float, unit: str = "") -> str:
    """Format a number in engineering style: 1234567 -> "1.23 M"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or prefix == "T":
            digits = 0 if prefix == "" else 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
            return f"{number:.{digits}f} {prefix}{unit}".rstrip()
        number /= 1000
    raise AssertionError("unreachable")


def size(number_of_bytes: float) -> str:
    """Format bytes in powers of 1024: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number_of_bytes < 1024 or unit == "GiB":
            return f"{number_of_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        number_of_bytes /= 1024
    raise AssertionError("unreachable")


def ratio(before: float, after: float) -> str:
    """Format a reduction: "3.89x"; "-" where nothing is left."""
    return f"{before / after:.2f}x" if after else "-"


def _heading(report: "Inspection") -> Table:
    title = f"{report.model} compiled by hidrop_fx"
    notes: tuple[str, ...] = (f"schedule  {report.schedule}", f"backend   {report.backend}")
    if report.passes:
        notes += (f"passes    {', '.join(report.passes)}",)
    if not report.called:
        notes += ("No call yet. Call generate or forward, then inspect again.",)
    return Table(title=title, notes=notes)


def _plan(report: "Inspection") -> Table:
    _, *lines = str(report.plan).splitlines()
    return Table(title="Plan for a typical sample", notes=tuple(lines))


def _layers(report: "Inspection") -> Table:
    rows = tuple(_layer(layer) for layer in report.layers)
    count = len(report.text_tokens)
    row = report.row or 0
    sample = (
        f"{report.text_tokens[row]} text + {report.vision_tokens[row]} vision tokens, "
        f"{plural(report.images[row], 'image')}"
    )
    if count == 1:
        title = f"Last prompt: {sample}"
    else:
        title = f"Last prompt, row {row} of {count} rows (0 to {count - 1}): {sample}"
    notes = []
    if count > 1:
        each = ", ".join(
            f"{text}+{vision}"
            for text, vision in zip(report.text_tokens, report.vision_tokens, strict=True)
        )
        notes.append(f"text + vision tokens of each row: {each}")
        notes.append("KV length is the same for all rows; shorter rows are padded in it")
    return Table(
        title=title,
        columns=(
            *("layer", "<region", "<stream", "<nodes inserted", "tokens", "vision"),
            *("KV length", "KV", "FLOPs"),
        ),
        rows=rows,
        notes=tuple(notes),
    )


def _layer(layer: "LayerReport") -> tuple[str, ...]:
    return (
        str(layer.layer),
        layer.region,
        layer.segment,
        layer.inserted,
        str(layer.tokens),
        str(layer.vision_tokens),
        "-" if layer.kv_length is None else str(layer.kv_length),
        "-" if layer.kv_length is None else size(layer.kv_bytes),
        amount(layer.flops),
    )


def _totals(report: "Inspection") -> Table:
    ours, theirs = report.totals, report.identity
    assert ours is not None
    assert theirs is not None
    count = len(report.text_tokens)
    rows = (
        (
            "tokens, summed over layers",
            str(ours.token_layers),
            str(theirs.token_layers),
            ratio(theirs.token_layers, ours.token_layers),
        ),
        (
            "prefill FLOPs, output head included",
            amount(ours.flops),
            amount(theirs.flops),
            ratio(theirs.flops, ours.flops),
        ),
        (
            "KV of the prompt's tokens",
            size(ours.kv_bytes),
            size(theirs.kv_bytes),
            ratio(theirs.kv_bytes, ours.kv_bytes),
        ),
    )
    notes = "no KV cache in use"
    if report.cache_bytes is not None:
        notes = (
            f"buffers of the last KV cache: {size(report.cache_bytes)}, padding and room for new "
            "tokens included"
        )
    return Table(
        title="Totals" if count == 1 else f"Totals of all {count} rows",
        columns=("<", "schedule", "identity", "ratio"),
        rows=rows,
        notes=(notes,),
    )


def _compilation(report: "Inspection") -> list[Table]:
    found = []
    if report.captures:
        seconds = ", ".join(f"{s:.1f} s" for s in report.captures)
        times = plural(len(report.captures), "time")
        found.append(Table(title="Capture", notes=(f"decoder captured {times}: {seconds}",)))
    if report.executables:
        found.append(
            Table(
                title="Executables",
                columns=("<program", "<serves", "calls", "bodies", "compiled", "<CUDA graph"),
                rows=tuple(
                    (
                        e.name,
                        e.serves,
                        str(e.calls),
                        str(e.bodies),
                        f"{e.seconds:.1f} s",
                        e.cuda_graph,
                    )
                    for e in report.executables
                ),
            )
        )
    if report.bodies:
        found.append(
            Table(
                title="Bodies",
                columns=("<body", "<serves"),
                rows=tuple((body.name, body.serves) for body in report.bodies),
            )
        )
    if report.called:
        found.append(_compiled(report))
    if report.recompiles:
        found.append(Table(title="Compiled again", notes=report.recompiles))
    if report.fallbacks:
        found.append(Table(title="Fallbacks (slower, not wrong)", notes=report.fallbacks))
    return found


def _compiled(report: "Inspection") -> Table:
    if not report.compiled:
        reason = "the eager backend compiles nothing" if report.backend == "eager" else "nothing"
        return Table(title="Compiled", notes=(reason,))
    return Table(
        title="Compiled",
        columns=("<body", "<first input", "seconds"),
        rows=tuple((e.name, e.shapes, f"{e.seconds:.1f}") for e in report.compiled),
        notes=(
            f"{plural(len(report.compiled), 'compilation')}, {report.compile_seconds:.1f} s in all",
        ),
    )


def _text(table: Table) -> str:
    lines = [table.title]
    if table.columns:
        heads = tuple(head.removeprefix("<") for head in table.columns)
        grid = [heads, *table.rows]
        widths = [max(len(row[c]) for row in grid) for c in range(len(heads))]
        for row in grid:
            cells = [
                cell.ljust(width) if head.startswith("<") else cell.rjust(width)
                for cell, width, head in zip(row, widths, table.columns, strict=True)
            ]
            lines.append(("  " + "  ".join(cells)).rstrip())
    lines += [f"  {note}".rstrip() for note in table.notes]
    return "\n".join(lines)


def _html(table: Table) -> str:
    parts = [f"<h4>{escape(table.title)}</h4>"]
    if table.columns:
        heads = "".join(f"<th>{escape(head.removeprefix('<'))}</th>" for head in table.columns)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
        )
        parts.append(f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>")
    if table.notes:
        parts.append(f"<pre>{escape(chr(10).join(table.notes))}</pre>")
    return "".join(parts)
