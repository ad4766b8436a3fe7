"""Print the results of the command line: tables, answers, bars, and a picture made of half blocks."""

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hidrop_fx.demo.session import AnsweredQuestion, BatchComparison, Session
from hidrop_fx.inspection.report.ranges import runs
from hidrop_fx.inspection.report.snapshot import Inspection
from hidrop_fx.inspection.table import ratio, size
from hidrop_fx.inspection.timing import Measurement

_PIPED_WIDTH = 120
_PICTURE_WIDTH = 48
_BAR_WIDTH = 40


def stdout_console() -> Console:
    """Return a console for stdout; where that is no terminal, one that does not wrap at 80 columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH)


def print_session(session: Session, console: Console) -> None:
    """Print the picture, the questions and answers, and the measurements of a demo."""
    console.print(f"Picture written to {session.path}", markup=False, soft_wrap=True)
    if console.is_terminal:
        console.print(half_blocks(session.picture.image, _PICTURE_WIDTH))
    report = session.inspection
    console.print(f"Schedule {report.schedule}, backend {report.backend}", markup=False)
    console.print(_answer_table(session.answered))
    console.print(token_bars(report, ascii_only=console.options.ascii_only))
    console.print(_session_table(session))
    console.print(remarks(session), markup=False)


def print_answer(found: Mapping[str, Any], report: Inspection, console: Console) -> None:
    """Print the answer of `hidrop run`, and Hugging Face's if it was asked for."""
    hf = found.get("hf")
    if hf is not None:
        _print_named("Hugging Face", hf["answer"], console)
        _print_named(str(report.schedule), found["answer"], console)
    else:
        console.print(Text(found["answer"]))
    console.print()
    first, cache = found["first_token_seconds"], found["kv_bytes"]
    line = f"time to first token {_duration(first)}, KV cache after the prompt {size(cache)}"
    if hf is not None:
        line += (
            f"\nHugging Face: {_duration(hf['first_token_seconds'])}, {size(hf['kv_bytes'])}; "
            f"the schedule is {ratio(hf['first_token_seconds'], first)} as fast, its cache "
            f"{ratio(hf['kv_bytes'], cache)} smaller"
        )
    console.print(line, markup=False)
    spans = [f"{layers}: {tokens}" for layers, tokens in _token_runs(report)]
    console.print(f"tokens per layer  {', '.join(spans)}", markup=False)
    plain = report.plan.identity.tokens
    console.print(f"Hugging Face      0-{len(plain) - 1}: {plain[0]}", markup=False)
    compiled = len(report.compiled)
    if compiled:
        console.print(f"{compiled} compilations took {report.compile_seconds:.1f} s")
    for reason in report.fallbacks:
        console.print(reason, markup=False, style="yellow")


def print_measurements(
    report: Inspection, theirs: Measurement, ours: Measurement, console: Console
) -> None:
    """Print the times of one prompt, plainly and under the schedule."""
    console.print(f"Schedule {report.schedule}, backend {report.backend}", markup=False)
    table = _ratio_table()
    _add_prompt_rows(table, report, theirs, ours)
    console.print(table)
    for reason in report.fallbacks:
        console.print(reason, markup=False, style="yellow")


def half_blocks(image: Image.Image, width: int) -> Text:
    """Render a square image as text, two pixels a character."""
    small = image.convert("RGB").resize((width, width), Image.Resampling.BOX)
    text = Text(no_wrap=True)
    for y in range(0, width - 1, 2):
        for x in range(width):
            upper, lower = (f"#{_hex(small, x, row)}" for row in (y, y + 1))
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    return text


def token_bars(report: Inspection, *, ascii_only: bool = False) -> Table:
    """Draw a bar for each run of layers with equal token counts, against Hugging Face's count.

    Args:
        ascii_only: draw with "#" and "." in place of block characters.
    """
    full, rest = ("#", ".") if ascii_only else ("█", "░")
    whole = max(report.plan.identity.tokens)
    table = Table(box=None, pad_edge=False, title="tokens per layer", title_justify="left")
    table.add_column("layers", justify="right")
    table.add_column(f"of {whole} in plain Hugging Face")
    table.add_column("", justify="right")
    for layers, tokens in _token_runs(report):
        length = max(1, round(_BAR_WIDTH * tokens / whole))
        bar = Text(full * length, style="green").append(rest * (_BAR_WIDTH - length), style="dim")
        table.add_row(layers, bar, str(tokens))
    return table


def remarks(session: Session) -> str:
    """Say what was compared, how, and what the times leave out."""
    report = session.inspection
    lines = [
        "Both sides are the same weights and `generate`. Hugging Face's model runs as transformers "
        "ships it, uncompiled; under",
        f"the schedule it is compiled (backend {report.backend}). Medians after a warm-up. The model "
        f"is tiny ({session.parameters / 1e6:.1f} M parameters):",
        "much of a single prompt's time does not depend on its tokens. `hidrop plan` tells the token "
        "counts of large models.",
    ]
    if report.compiled:
        lines.append(f"{len(report.compiled)} compilations took {report.compile_seconds:.1f} s.")
    return "\n".join([*lines, *report.fallbacks])


def _token_runs(report: Inspection) -> Iterator[tuple[str, int]]:
    """Yield runs of layers with equal counts: ("0-2", 12), ("3-4", 156), ..."""
    for first, last, tokens in runs([layer.tokens for layer in report.layers]):
        yield f"{first}" if first == last else f"{first}-{last}", tokens


def _answer_table(answered: tuple[AnsweredQuestion, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("question", footer="right", min_width=24)
    table.add_column("expected")
    for title, name in (("Hugging Face", "hf"), ("schedule", "hidrop")):
        right = sum(getattr(one, name) == one.expected for one in answered)
        table.add_column(title, footer=f"{right} of {len(answered)}")
    for one in answered:
        answers = [_marked(answer, one.expected) for answer in (one.hf, one.hidrop)]
        table.add_row(Text(one.question), Text(one.expected), *answers)
    return table


def _marked(answer: str, expected: str) -> Text:
    return Text(answer, style="green" if answer == expected else "red")


def _session_table(session: Session) -> Table:
    """Tabulate one prompt and the batch, with ratios."""
    table = _ratio_table()
    table.add_row(Text("one prompt", style="bold"))
    _add_prompt_rows(table, session.inspection, session.hf, session.hidrop)
    _add_batch_rows(table, session.batch)
    return table


def _ratio_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for title in ("Hugging Face", "schedule", "ratio"):
        table.add_column(title, justify="right")
    return table


def _add_prompt_rows(
    table: Table, report: Inspection, theirs: Measurement, ours: Measurement
) -> None:
    before, after = sum(report.plan.identity.tokens), sum(report.plan.tokens)
    table.add_row("tokens, summed over layers", str(before), str(after), ratio(before, after))
    first = theirs.first_token_seconds, ours.first_token_seconds
    table.add_row("time to first token", *map(_duration, first), ratio(*first))
    speeds = theirs.decode_tokens_per_second, ours.decode_tokens_per_second
    if speeds[0] is not None and speeds[1] is not None:
        shown = [f"{speed:.0f} tokens/s" for speed in (speeds[0], speeds[1])]
        table.add_row("decode speed", *shown, ratio(speeds[1], speeds[0]))
    caches = theirs.kv_bytes, ours.kv_bytes
    table.add_row("KV cache after the prompt", *map(size, caches), ratio(*caches))


def _add_batch_rows(table: Table, batch: BatchComparison) -> None:
    sides = (batch.hf, batch.hidrop)
    plural = "" if batch.pictures == 1 else "s"
    heading = f"{batch.questions} questions about {batch.pictures} picture{plural}, in one call"
    table.add_row("")
    table.add_row(Text(heading, style="bold"))
    table.add_row("answers right", *(f"{side.correct} of {batch.questions}" for side in sides), "")
    seconds = [side.seconds for side in sides]
    table.add_row("time of the call", *map(_duration, seconds), ratio(*seconds))
    speeds = [side.questions_per_second for side in sides]
    table.add_row("questions a second", *(f"{speed:.0f}" for speed in speeds), ratio(*speeds[::-1]))


def _print_named(name: str, answer: str, console: Console) -> None:
    console.print(Text(name, style="bold"))
    console.print(Text(answer))


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _hex(image: Image.Image, x: int, y: int) -> str:
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return "".join(f"{int(value):02x}" for value in pixel[:3])
