"""Measure a model on held-out pictures: ``python -m hidrop_fx.demo.evaluate``.

Asks with the plain Hugging Face ``generate`` (greedy, batched, left-padded), then under the demo
schedule.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.demo.answers import DEMO, Speaker
from hidrop_fx.demo.pictures import DESCRIBE, Picture, held_out, picture, prompt


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Sequence[tuple[Picture, str]],
    max_new_tokens: int = 4,
) -> list[str]:
    """Return greedy answers to one batch of pictures with prompts."""
    inputs = processor(
        images=[drawn.image for drawn, _ in asked],
        text=[prompt_text for _, prompt_text in asked],
        padding=True,
        return_tensors="pt",
    )
    produced = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)  # type: ignore[misc]
    fresh = produced[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = processor.batch_decode(fresh, skip_special_tokens=True)
    return texts


def tally(marks: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Return the share of right answers over all and by kind."""
    shares = {"all": sum(right for _, right in marks) / len(marks)}
    for kind in sorted({kind for kind, _ in marks}):
        chosen = [right for name, right in marks if name == kind]
        shares[kind] = sum(chosen) / len(chosen)
    return {kind: round(share, 4) for kind, share in shares.items()}


def measure(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: int,
    first: int = 0,
    batch: int = 32,
) -> dict[str, float]:
    """Measure exact-match accuracy over all held-out questions and by kind."""
    asked = list(held_out(pictures, first))
    marks: list[tuple[str, bool]] = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        texts = answers(model, processor, [(drawn, one.prompt_text) for drawn, one in part])
        for (_, question), text in zip(part, texts, strict=True):
            marks.append((question.kind, text.strip() == question.answer))
    return tally(marks)


def described(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: int, first: int = 0
) -> float:
    """Return the share of the cells of held-out pictures that the description of the whole grid gets right."""
    drawn = [picture(seed, "test") for seed in range(first, first + pictures)]
    texts = answers(model, processor, [(one, prompt(DESCRIBE)) for one in drawn], 27)
    right = 0
    for one, text in zip(drawn, texts, strict=True):
        told = text.strip().split(" , ")
        right += sum(cell.text == said for cell, said in zip(one.cells, told, strict=False))
    return right / sum(len(one.cells) for one in drawn)


def main() -> None:
    """Measure the shipped model, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first picture")
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    print("questions:", sum(1 for _ in held_out(options.pictures, options.first)))
    print("plain:    ", measure(model, processor, options.pictures, options.first))
    share = described(model, processor, min(options.pictures, 100), options.first)
    print("cells in plain descriptions:", round(share, 4))
    print("scheduled:", Speaker(model).accuracy(DEMO, options.first, options.pictures))


if __name__ == "__main__":
    main()
