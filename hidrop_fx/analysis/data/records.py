"""Read calibration data from files: LLaVA's JSON, or a folder of images with prompts.

    records = read_records(Path("llava_v1_5_mix665k.json"), images=Path("images"), limit=64)
    batches = batches_of(model, processor, records, batch_size=8, answers=True)

Of a conversation the first question and its answer are taken.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.models.prompts import chat_inputs, open_image
from hidrop_fx.planning.batch_layout import IGNORE

PROMPT_FILE = "prompts.txt"
_IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_PLACEHOLDER = "<image>"
_SHORT_ANSWER = 5
_FORMAT = (
    'a list of {"image": "file", "conversations": [{"from": "human", "value": "<image>\\nquestion"}, '
    '{"from": "gpt", "value": "answer"}]}'
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample: images, a question, maybe its answer."""

    images: tuple[Path | Image.Image, ...]
    prompt: str
    """The question, without image placeholders."""
    answer: str | None = None


def read_records(
    path: Path, *, images: Path | None = None, prompts: Path | None = None, limit: int = 64
) -> list[Record]:
    """Read the first `limit` records of a LLaVA JSON file, or of a folder of images.

    Args:
        path: the file or folder.
        images: what the image names of a JSON file are relative to; its own folder by default.
        prompts: of a folder: lines "image name<TAB>question", or questions that are put to the images
            in turn; `prompts.txt` in the folder by default.
        limit: records to read at most.

    Raises:
        InputError: no such file, or it holds something else; says what is expected.
    """
    if path.is_dir():
        found = _from_folder(path, prompts or path / PROMPT_FILE)
    elif path.is_file():
        found = _from_json(path, images or path.parent)
    else:
        raise InputError(
            f"no calibration data at {path}: pass a LLaVA-format JSON file or a folder"
        )
    records = [record for record, _ in zip(found, range(limit), strict=False)]
    if not records:
        raise InputError(f"{path} holds no sample with an image")
    return records


def short_answers(records: Sequence[Record]) -> bool:
    """Return True if every record has an answer short enough to be judged right or wrong."""
    return all(r.answer and len(r.answer.split()) <= _SHORT_ANSWER for r in records)


def batches_of(
    model: Any, processor: Any, records: Sequence[Record], *, batch_size: int, answers: bool
) -> Iterator[dict[str, Any]]:
    """Yield batches for `calibrate`, padded on the right; images are opened as they are needed.

    Args:
        model: used for its device and dtype.
        processor: the model's.
        records: samples in order.
        batch_size: rows of a batch.
        answers: append the answers and supervise them.
    """
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        yield _collated(processor, [_row(model, processor, record, answers) for record in part])


def _from_json(path: Path, folder: Path) -> Iterator[Record]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; expected {_FORMAT}") from error
    if not isinstance(data, list):
        raise InputError(f"{path} holds a {type(data).__name__}; expected {_FORMAT}")
    for number, entry in enumerate(data):
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            raise InputError(f"entry {number} of {path} has no conversations; expected {_FORMAT}")
        names = entry.get("image")
        if names is None:
            continue
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) for name in names):
            raise InputError(f"entry {number} of {path} has image {names!r}; expected {_FORMAT}")
        turns = entry["conversations"]
        try:
            question = str(turns[0]["value"])
            answer = str(turns[1]["value"]) if len(turns) > 1 else None
        except (IndexError, KeyError, TypeError) as error:
            raise InputError(
                f"entry {number} of {path} has no first turn with a value; expected {_FORMAT}"
            ) from error
        yield Record(
            images=tuple(folder / name for name in names),
            prompt=question.replace(_PLACEHOLDER, "").strip(),
            answer=answer,
        )


def _from_folder(folder: Path, prompts: Path) -> Iterator[Record]:
    if not prompts.is_file():
        raise InputError(
            f'no prompt file {prompts}: write one with a question a line, or "image name<TAB>question"'
        )
    try:
        text = prompts.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {prompts}: {error}; save it as UTF-8 text") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{prompts} is empty: write a question a line")
    if any("\t" in line for line in lines):
        for line in lines:
            name, tab, question = line.partition("\t")
            if not tab:
                raise InputError(
                    f'{prompts}: {line!r} has no tab: write "image name<TAB>question" on every line, or on none'
                )
            yield Record(images=(folder / name.strip(),), prompt=question.strip())
        return
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _IMAGE_FILES)
    for index, file in enumerate(files):
        yield Record(images=(file,), prompt=lines[index % len(lines)])


def _row(model: Any, processor: Any, record: Record, answers: bool) -> dict[str, Tensor]:
    shown = [open_image(one) if isinstance(one, Path) else one for one in record.images]
    row = {
        k: v
        for k, v in chat_inputs(model, processor, shown, record.prompt).items()
        if v is not None
    }
    if not answers:
        return row
    if not record.answer:
        raise InputError(f"no answer to {record.prompt!r}; calibrate without answers")
    tokens = processor.tokenizer(record.answer, add_special_tokens=False)["input_ids"]
    told = torch.tensor([tokens], device=row["input_ids"].device)
    labels = torch.full_like(row["input_ids"], IGNORE)
    row["labels"] = torch.cat([labels, told], dim=1)
    row["input_ids"] = torch.cat([row["input_ids"], told], dim=1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    return row


def _collated(processor: Any, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    pad = processor.tokenizer.pad_token_id
    fill = {"input_ids": 0 if pad is None else pad, "attention_mask": 0, "labels": IGNORE}
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in fill:
            values = [
                torch.nn.functional.pad(v, (0, length - v.shape[1]), value=fill[name])
                for v in values
            ]
            batch[name] = torch.cat(values)
        elif name != "token_type_ids":
            batch[name] = torch.cat(values)
    return batch
