"""Render reports as tables: plain text, HTML in a notebook, and rich's on a terminal."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


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
