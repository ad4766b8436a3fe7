"""LLaVA-format conversations as training batches: JSON and an image folder in, tensors out.

    [{"id": "7", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}, ...]}, ...]

A row may hold several rounds, a list of images, or no image. Only what the model has to say is
supervised: each gpt turn with the end-of-sequence token after it. All other labels are -100.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hidrop_fx.demo.pictures import Question, all_questions, picture

IGNORE = -100
LAYOUTS = ("chat", "caption")

Row = dict[str, Any]
Piece = tuple[str, bool]
"""Text, and whether it is supervised."""


class Conversations(Dataset):
    """Rows as token ids and labels; their images are opened by the collator, when they are needed.

    So `group_by_length` costs one pass of the tokenizer, not one over all images.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path,
        processor: Any,
        *,
        layout: str = "chat",
        max_length: int = 2048,
    ) -> None:
        self.rows: list[Row] = json.loads(Path(path).read_text(encoding="utf-8"))
        self.images = Path(images)
        self.processor = processor
        self.layout = layout
        self.max_length = max_length
        self.tokens_per_image = tokens_per_image(processor)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        pieces = pieces_of(row, self.processor, self.layout)
        ids, labels = tokenized(pieces, self.processor, self.tokens_per_image)
        length = self._cut(ids, row)
        return {
            "input_ids": ids[:length],
            "labels": labels[:length],
            "images": [self.images / name for name in image_names(row)],
        }

    def _cut(self, ids: Tensor, row: Row) -> int:
        places = (ids == self.processor.image_token_id).nonzero()
        if len(places) and int(places[-1]) >= self.max_length:
            raise ValueError(
                f"row {row.get('id')!r} has an image beyond max_length={self.max_length}; raise it, or "
                "leave the row out"
            )
        return self.max_length


class Collator:
    """Rows padded on the right, and their images in the order of their places."""

    def __init__(self, processor: Any, *, pad_square: bool = False) -> None:
        self.processor = processor
        self.pad_square = pad_square

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [one["input_ids"] for one in samples]
        batch = {
            "input_ids": padded(ids, self.processor.tokenizer.pad_token_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "labels": padded([one["labels"] for one in samples], IGNORE),
        }
        paths = [path for one in samples for path in one["images"]]
        if paths:
            images = [self._open(path) for path in paths]
            found = self.processor.image_processor(images, return_tensors="pt")
            batch["pixel_values"] = found["pixel_values"]
        return batch

    def _open(self, path: Path) -> Image.Image:
        with Image.open(path) as stored:
            image = stored.convert("RGB")
        return squared(image, self.processor.image_processor) if self.pad_square else image


def pieces_of(row: Row, processor: Any, layout: str = "chat") -> list[Piece]:
    """Return the row as text, split where supervision starts and ends."""
    turns = _turns(row, processor.image_token)
    end = processor.tokenizer.eos_token
    if layout == "caption":
        return _caption(turns, processor.image_token)
    if layout != "chat":
        raise ValueError(f"layout={layout!r}; use one of {', '.join(LAYOUTS)}")
    if getattr(processor, "chat_template", None) is None:
        return _plain_chat(turns, processor.image_token, end)
    return _templated(turns, processor, end)


def tokenized(
    pieces: Sequence[Piece], processor: Any, image_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Tokenize: ids and labels [L] of the pieces as one text, `image_tokens` placeholders for each image."""
    text = "".join(piece for piece, _ in pieces)
    start = processor.tokenizer.bos_token
    found = processor.tokenizer(
        text,
        return_offsets_mapping=True,
        add_special_tokens=not (start and text.startswith(start)),
    )
    ids = torch.tensor(found["input_ids"])
    answered = torch.tensor([supervised for piece, supervised in pieces for _ in piece] + [False])
    # A token belongs where its first character does; one without characters (BOS) is never supervised.
    offsets = torch.tensor(found["offset_mapping"])
    answers = answered[offsets[:, 0]] & (offsets[:, 1] > offsets[:, 0])
    labels = ids.masked_fill(~answers, IGNORE)
    repeats = torch.where(ids == processor.image_token_id, image_tokens, 1)
    return ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)


def tokens_per_image(processor: Any) -> int:
    """Return placeholders that the processor puts in the place of one image."""
    blank = Image.new("RGB", (336, 336))
    ids = processor(images=blank, text=processor.image_token, return_tensors="pt")["input_ids"]
    return int((ids == processor.image_token_id).sum())


def image_names(row: Row) -> list[str]:
    """Return the files of a row, none for text alone."""
    given = row.get("image") or []
    return [given] if isinstance(given, str) else list(given)


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack rows of unequal length into one tensor, padded on the right."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def squared(image: Image.Image, image_processor: Any) -> Image.Image:
    """Paste the image into the middle of a square of the mean colour, as LLaVA-1.5 was tuned."""
    side = max(image.size)
    colour = tuple(int(255 * share) for share in image_processor.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _turns(row: Row, token: str) -> list[tuple[str, str, int]]:
    """Yield role, text and images of each turn, image tokens removed from the text."""
    turns = []
    for turn in row["conversations"]:
        role = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
        text = re.sub(re.escape(token) + r"\n?", "", turn["value"]).strip()
        turns.append((role, text, turn["value"].count(token)))
    while turns and turns[0][0] == "assistant":
        turns.pop(0)
    placed, given = sum(images for _, _, images in turns), len(image_names(row))
    if given and not placed:
        role, text, _ = turns[0]
        turns[0] = (role, text, given)
    elif given != placed:
        raise ValueError(
            f"row {row.get('id')!r} names {given} images, its text holds {placed} {token}; make them equal"
        )
    return turns


def _templated(turns: Sequence[tuple[str, str, int]], processor: Any, end: str) -> list[Piece]:
    messages: list[dict[str, Any]] = []
    pieces: list[Piece] = []
    done = ""
    for role, text, images in turns:
        if role == "assistant":
            asked = processor.apply_chat_template(messages, add_generation_prompt=True)
            pieces.append((_rest(asked, done), False))
            done = asked
        content: list[dict[str, str]] = [{"type": "image"}] * images
        messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
        if role == "assistant":
            told = processor.apply_chat_template(messages)
            answer = _rest(told, done)
            # Without an end after each answer the model would never learn to stop.
            if end not in answer:
                answer = answer.rstrip() + end
            head, tail = answer.split(end, 1)
            pieces += [(head + end, True), (tail, False)]
            done = told
    return [piece for piece in pieces if piece[0]]


def _rest(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(
            "the chat template changes earlier turns when a turn is added, so the answers in its text "
            "cannot be told apart; use a template that only appends"
        )
    return text[len(start) :]


def _plain_chat(turns: Sequence[tuple[str, str, int]], token: str, end: str) -> list[Piece]:
    """Format LLaVA's "v1" layout without a system prompt."""
    pieces: list[Piece] = []
    for role, text, images in turns:
        if role == "assistant":
            pieces += [(" ASSISTANT:", False), (f" {text}{end}", True)]
        else:
            name = "USER: " if role == "user" else ""
            pieces.append((name + f"{token}\n" * images + text, False))
    return pieces


def _caption(turns: Sequence[tuple[str, str, int]], token: str) -> list[Piece]:
    """Format LLaVA's "plain" layout of the first stage: images, then what is said of them."""
    images = sum(count for _, _, count in turns)
    told = " ".join(text for role, text, _ in turns if role == "assistant")
    return [(token * images, False), (f"{told}\n", True)]


def conversation(asked: Sequence[Question], identifier: str, image: str) -> Row:
    """Format questions about one picture as rounds of a LLaVA-format row."""
    rounds = []
    for index, question in enumerate(asked):
        text = question.prompt_text.split("\n", 1)[1].removesuffix(" ASSISTANT:")
        text = text if index else f"<image>\n{text}"
        rounds += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return {"id": identifier, "image": image, "conversations": rounds}


def write_demo_data(folder: str | Path, samples: int = 300, rounds: int = 3) -> tuple[Path, Path]:
    """Write a LLaVA-format data set of the demo's drawn pictures: its JSON file and image folder.

    One row in twenty has no image.
    """
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(samples):
        if seed % 20 == 19:
            turns = [
                {"from": "human", "value": "Is there a thing?"},
                {"from": "gpt", "value": "no"},
            ]
            rows.append({"id": str(seed), "conversations": turns})
            continue
        drawn = picture(5_000_000 + seed, "train")
        name = f"{seed:05}.png"
        drawn.image.save(images / name)
        asked = random.Random(seed).sample(all_questions(drawn), rounds)
        rows.append(conversation(asked, str(seed), name))
    path = Path(folder) / "conversations.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path, images
