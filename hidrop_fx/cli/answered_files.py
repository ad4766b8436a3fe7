"""Run `hidrop run --data`: the questions of files under one schedule, a part in each process.

answer_files(options, records, batch_size=8, max_new_tokens=64, output=Path("answers.jsonl"), as_json=False)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from hidrop_fx.analysis.data.records import Record, read_records
from hidrop_fx.cli.answering import (
    answers_to,
    compile_once,
    in_batches,
    load_everywhere,
    progress_bar,
)
from hidrop_fx.cli.application import hide_bars
from hidrop_fx.cli.options import PromptOptions
from hidrop_fx.cli.prompts import schedule_text
from hidrop_fx.demo import SCHEDULE_FILE
from hidrop_fx.distributed.processes import Processes, joined
from hidrop_fx.errors import HidropError


def answer_files(
    options: PromptOptions,
    data: Path,
    *,
    images: Path | None,
    prompts: Path | None,
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Answer the first `samples` questions of files; print the answers in order, or write them, a JSON object a line.

    Raises:
        HidropError: no such file, model or schedule; or a process failed.
    """
    if options.schedule is None and options.model is not None:
        raise HidropError("--schedule must be given with --model")
    schedule = schedule_text(options.model, options.schedule) or str(SCHEDULE_FILE)
    if output is not None and not output.parent.is_dir():
        raise HidropError(f"{output.parent} is no directory; make it, or name another --output")
    records = read_records(data, images=images, prompts=prompts, limit=samples)
    hide_bars()
    with joined() as processes:
        texts = _answers(options, schedule, records, processes, batch_size, max_new_tokens, as_json)
    if not processes.is_first:
        return
    found = [
        {"index": place, "images": _names(record), "prompt": record.prompt, "answer": text}
        for place, (record, text) in enumerate(zip(records, texts, strict=True))
    ]
    lines = [json.dumps(each) for each in found]
    if output is not None:
        output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        typer.echo(f"{len(found)} answers written to {output}", err=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif output is None:
        typer.echo("\n".join(lines))


def _answers(
    options: PromptOptions,
    schedule: str,
    records: Sequence[Record],
    processes: Processes,
    batch_size: int,
    max_new_tokens: int,
    as_json: bool,
) -> list[str]:
    """Return the answers in the order of the records, in the first process; none in others."""
    prompt = load_everywhere(options, schedule, processes)
    batches = in_batches(records, batch_size)
    answers: dict[int, list[str]] = {}

    def answer(batch: Sequence[Record]) -> list[str]:
        return answers_to(prompt.model, prompt.processor, batch, max_new_tokens)[0]

    own = processes.own(batches)
    compile_once(prompt, options, processes, (lambda: answer(own[0])) if own else None)
    with progress_bar(len(records), processes, as_json=as_json) as bar:

        def received(place: int, texts: list[str]) -> None:
            answers[place] = texts
            bar.update(len(texts))

        processes.share_out(batches, answer, received)
    return [text for place in sorted(answers) for text in answers[place]]


def _names(record: Record) -> list[Any]:
    return [str(image) for image in record.images]
