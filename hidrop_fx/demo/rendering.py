"""Print what the command line found out: tables, answers, and a picture made of half blocks."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hidrop_fx.demo.session import Asked, Session
from hidrop_fx.inspection.report.inspection import Inspection
from hidrop_fx.inspection.report.last_call import runs
from hidrop_fx.inspection.table import ratio, size
from hidrop_fx.inspection.timing import Measurement

_PIPED_WIDTH = 120
_PICTURE_WIDTH = 48
# Below this share of what the token counts promise, say that the model is too small for it.
_SHARE = 0.6


def stdout_console() -> Console:
    """A console that does not wrap at 80 columns where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH)


def print_session(session: Session, console: Console) -> None:
    """The picture, questions and answers, and the measurements of a demo."""
    console.print(f"Picture written to {session.path}", markup=False, soft_wrap=True)
    if console.is_terminal:
        console.print(half_blocks(session.picture.image, _PICTURE_WIDTH))
    report = session.inspection
    console.print(f"Schedule {report.schedule}, backend {report.backend}", markup=False)
    console.print(_answers(session.asked))
    _print_token_runs(report, console)
    console.print(_measurements(session.inspection, session.hf, session.hidrop))
    console.print(remarks(session), markup=False)


def print_answer(found: Mapping[str, Any], report: Inspection, console: Console) -> None:
    """The answer of a run, and that of Hugging Face's model if it was asked."""
    hf = found.get("hf")
    if hf is not None:
        _print_named("Hugging Face", hf["answer"], console)
        _print_named(str(report.schedule), found["answer"], console)
    else:
        console.print(Text(found["answer"]))
    console.print()
    first, cache = found["first_token_seconds"], found["kv_bytes"]
    line = f"time to first token {_milliseconds(first)}, KV cache after the prompt {size(cache)}"
    if hf is not None:
        line += (
            f"\nHugging Face: {_milliseconds(hf['first_token_seconds'])}, {size(hf['kv_bytes'])}; "
            f"the schedule is {ratio(hf['first_token_seconds'], first)} as fast, its cache "
            f"{ratio(hf['kv_bytes'], cache)} smaller"
        )
    console.print(line, markup=False)
    _print_token_runs(report, console)
    compiled = len(report.compiled)
    if compiled:
        console.print(f"{compiled} compilations took {report.compile_seconds:.1f} s")
    for reason in report.fallbacks:
        console.print(reason, markup=False, style="yellow")


def half_blocks(image: Image.Image, width: int) -> Text:
    """A square image as text, two pixels a character."""
    small = image.convert("RGB").resize((width, width), Image.Resampling.BOX)
    text = Text(no_wrap=True)
    for y in range(0, width - 1, 2):
        for x in range(width):
            upper, lower = (f"#{_hex(small, x, row)}" for row in (y, y + 1))
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    return text


def remarks(session: Session) -> str:
    """What the measured times do and do not say, in a sentence or two."""
    promised = session.inspection.plan.token_layer_ratio
    reached = session.hf.first_token_seconds / session.hidrop.first_token_seconds
    lines = [
        f"Measured on one prompt, warm; Hugging Face's model runs uncompiled. The model is tiny "
        f"({session.parameters / 1e6:.1f} M parameters).",
    ]
    if reached < _SHARE * promised:
        lines.append(
            f"The layers run on {promised:.2f}x fewer tokens, the first token comes "
            + (f"{reached:.2f}x sooner" if reached >= 1 else f"{1 / reached:.2f}x later")
            + ": at this size much of a call does not depend on how many tokens there are. These "
            "times say little about a large model; `hidrop plan` tells its token counts and FLOPs."
        )
    report = session.inspection
    if report.compiled:
        lines.append(f"{len(report.compiled)} compilations took {report.compile_seconds:.1f} s.")
    lines += report.fallbacks
    return "\n".join(lines)


def _answers(asked: tuple[Asked, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    right = [sum(getattr(one, name) == one.expected for one in asked) for name in ("hf", "hidrop")]
    table.add_column("question", footer="right", min_width=24)
    table.add_column("expected")
    for title, count in zip(("Hugging Face", "schedule"), right, strict=True):
        table.add_column(title, footer=f"{count} of {len(asked)}")
    for one in asked:
        answers = [_marked(answer, one.expected) for answer in (one.hf, one.hidrop)]
        table.add_row(Text(one.question), Text(one.expected), *answers)
    return table


def _marked(answer: str, expected: str) -> Text:
    return Text(answer, style="green" if answer == expected else "red")


def _print_token_runs(report: Inspection, console: Console) -> None:
    """Tokens of each layer on one line: "0-2: 12, 3-4: 156"."""
    spans = [
        f"{first if first == last else f'{first}-{last}'}: {tokens}"
        for first, last, tokens in runs([layer.tokens for layer in report.layers])
    ]
    console.print(f"tokens per layer  {', '.join(spans)}", markup=False)
    plain = report.plan.identity.tokens
    console.print(f"Hugging Face      0-{len(plain) - 1}: {plain[0]}", markup=False)


def print_measurements(
    report: Inspection, theirs: Measurement, ours: Measurement, console: Console
) -> None:
    """Times of a prompt, plainly and under the schedule."""
    console.print(f"Schedule {report.schedule}, backend {report.backend}", markup=False)
    console.print(_measurements(report, theirs, ours))
    for reason in report.fallbacks:
        console.print(reason, markup=False, style="yellow")


def _measurements(report: Inspection, theirs: Measurement, ours: Measurement) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for title in ("Hugging Face", "schedule", "ratio"):
        table.add_column(title, justify="right")
    counted = report.plan
    before, after = sum(counted.identity.tokens), sum(counted.tokens)
    table.add_row("tokens, summed over layers", str(before), str(after), ratio(before, after))
    first = theirs.first_token_seconds, ours.first_token_seconds
    table.add_row("time to first token", *map(_milliseconds, first), ratio(*first))
    speeds = theirs.decode_tokens_per_second, ours.decode_tokens_per_second
    if speeds[0] is not None and speeds[1] is not None:
        shown = [f"{speed:.0f} tokens/s" for speed in (speeds[0], speeds[1])]
        table.add_row("decode speed", *shown, ratio(speeds[1], speeds[0]))
    caches = theirs.kv_bytes, ours.kv_bytes
    table.add_row("KV cache after the prompt", *map(size, caches), ratio(*caches))
    return table


def _print_named(name: str, answer: str, console: Console) -> None:
    console.print(Text(name, style="bold"))
    console.print(Text(answer))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _hex(image: Image.Image, x: int, y: int) -> str:
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return "".join(f"{int(value):02x}" for value in pixel[:3])
