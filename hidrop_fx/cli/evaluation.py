"""Run `hidrop eval`: every question under every method, and the table.

rows = evaluated(options, processes, as_json=False)
print(table(rows))
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hidrop_fx.analysis.data.records import Record
from hidrop_fx.api import is_compiled, restore
from hidrop_fx.cli.answering import (
    answers_to,
    compile_once,
    in_batches,
    load_everywhere,
    progress_bar,
)
from hidrop_fx.cli.evaluation_options import BATCH_SIZE, NEW_TOKENS, EvaluationOptions
from hidrop_fx.cli.evaluation_settings import SHIPPED, Setting, questions_of, settings_of
from hidrop_fx.cli.options import PromptOptions
from hidrop_fx.cli.prompts import LoadedPrompt
from hidrop_fx.cli.sample_file import SampleFile
from hidrop_fx.distributed.processes import Processes
from hidrop_fx.evaluation.vision_tokens import executed_vision_tokens


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came out for one line of the table."""

    method: str
    budget: str
    schedule: str | None
    questions: int
    accuracy: float
    """Share of answers that are the right one, but for case and a full stop."""
    vision_tokens: float
    """Of a question, those that layers ran on, on average over layers."""
    seconds: float
    """Of a question: `generate` on its batch, warm, over the rows of the batch."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def evaluated(options: EvaluationOptions, processes: Processes, *, as_json: bool) -> list[Row]:
    """Ask what was not asked before, and return a row for each setting; in other processes than the first, none.

    Raises:
        HidropError: there is nothing to ask, or no such method; or a process failed.
    """
    records, kinds = questions_of(options)
    settings = settings_of(options)
    prompt_options = PromptOptions(
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        backend=options.backend,
    )
    file = SampleFile(options.output, _depends_on(options)) if processes.is_first else None
    missing: list[list[int]] = processes.told(lambda: _missing(file, settings, records))
    loaded: LoadedPrompt | None = None
    left, total = sum(map(len, missing)), len(settings) * len(records)
    with progress_bar(total, processes, as_json=as_json, done=total - left) as bar:
        for setting, indices in zip(settings, missing, strict=True):
            if not indices:
                continue
            if loaded is None:
                loaded = load_everywhere(prompt_options, "", processes)
            bar.set_description(f"{setting.method} {setting.budget}")
            _ask(
                setting,
                indices,
                records,
                kinds,
                loaded,
                prompt_options,
                options,
                processes,
                file,
                bar,
            )
    if file is None:
        return []
    places = {(s.method, s.budget): place for place, s in enumerate(settings)}
    last = len(places)
    file.close(lambda line: (places.get((line["method"], line["budget"]), last), line["index"]))
    return [_row(setting, file, len(records)) for setting in settings]


def table(rows: Sequence[Row]) -> str:
    """Write a table in Markdown, method by method."""
    lines = [
        "| method | budget | accuracy | vision tokens | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.method} | {row.budget} | {row.accuracy:.3f} | {row.vision_tokens:.1f} | {row.seconds:.4f} |"
        )
    return "\n".join(lines)


def is_right(answer: str, expected: str) -> bool:
    """Return True for the expected answer, but for case, spaces around it and a full stop."""
    return _bare(answer) == _bare(expected)


def _bare(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()


def _depends_on(options: EvaluationOptions) -> dict[str, Any]:
    """Return what every answer depends on."""
    return {
        "model": options.model or SHIPPED,
        "written": _written(options.model),
        "data": None if options.data is None else str(options.data),
        "images": None if options.images is None else str(options.images),
        "max_new_tokens": options.max_new_tokens or NEW_TOKENS,
        "batch_size": options.batch_size or BATCH_SIZE,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
        "backend": options.backend,
    }


def _written(model: str | None) -> str | None:
    """Return when the newest weights in a model's directory were written; None of a model that has no directory here."""
    files = (
        [] if model is None else [*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]
    )
    newest = max((path.stat().st_mtime for path in files), default=None)
    return None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat()


def _missing(
    file: SampleFile | None, settings: Sequence[Setting], records: Sequence[Record]
) -> list[list[int]]:
    """Return for each setting the places of the questions that have no answer yet."""
    assert file is not None
    return [
        [
            i
            for i, record in enumerate(records)
            if not file.has(
                (one.method, one.budget, i),
                schedule=one.schedule,
                question=record.prompt,
                expected=record.answer,
            )
        ]
        for one in settings
    ]


def _ask(
    setting: Setting,
    indices: Sequence[int],
    records: Sequence[Record],
    kinds: Sequence[str],
    loaded: LoadedPrompt,
    prompt_options: PromptOptions,
    options: EvaluationOptions,
    processes: Processes,
    file: SampleFile | None,
    bar: Any,
) -> None:
    """Put questions to the model under one setting, a part in each process; warm up first, which is not timed."""
    model, processor = loaded.model, loaded.processor
    batches = in_batches(indices, options.batch_size or BATCH_SIZE)

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        asked = [records[i] for i in batch]
        new_tokens = options.max_new_tokens or NEW_TOKENS
        texts, seconds, inputs = answers_to(model, processor, asked, new_tokens)
        tokens = executed_vision_tokens(model, inputs)
        return [
            {
                "method": setting.method,
                "budget": setting.budget,
                "schedule": setting.schedule,
                "index": i,
                "kind": kinds[i],
                "question": record.prompt,
                "expected": record.answer,
                "answer": text,
                "right": is_right(text, record.answer or ""),
                "vision_tokens": round(count, 2),
                "seconds": seconds / len(batch),
            }
            for i, record, text, count in zip(batch, asked, texts, tokens, strict=True)
        ]

    def received(_: int, lines: list[dict[str, Any]]) -> None:
        assert file is not None
        file.add(lines)
        bar.update(len(lines))

    own = processes.own(batches)
    warm = (lambda: answer(own[0])) if own else None
    if setting.schedule is None:
        if is_compiled(model):
            restore(model)
        if warm is not None:
            warm()
    else:
        compile_once(
            replace(loaded, schedule=setting.schedule),
            replace(prompt_options, schedule=setting.given),
            processes,
            warm,
        )
    processes.share_out(batches, answer, received)


def _row(setting: Setting, file: SampleFile, count: int) -> Row:
    lines = [file.lines[setting.method, setting.budget, i] for i in range(count)]
    return Row(
        method=setting.method,
        budget=setting.budget,
        schedule=setting.schedule,
        questions=count,
        accuracy=sum(line["right"] for line in lines) / count,
        vision_tokens=sum(line["vision_tokens"] for line in lines) / count,
        seconds=sum(line["seconds"] for line in lines) / count,
    )
