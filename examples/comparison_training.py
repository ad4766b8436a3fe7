"""Fine-tuning of the comparison: the same pictures and questions in the same order, under any schedule."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from comparison_task import IMAGE_TOKENS, asked_about, features, processor
from llava_data import conversation, padded, pieces_of, tokenized
from torch import Tensor, nn
from tqdm import tqdm

from hidrop_fx.demo.pictures import Picture, picture

FIRST_TRAINING_PICTURE = 6_000_000


@dataclass(frozen=True)
class Batch:
    """Pictures' features and the conversations about them."""

    features: Tensor
    rows: tuple[dict[str, Any], ...]

    def inputs(self) -> dict[str, Tensor]:
        """Return the model's inputs, padded on the right."""
        pairs = [
            tokenized(pieces_of(row, processor()), processor(), IMAGE_TOKENS) for row in self.rows
        ]
        ids = [row for row, _ in pairs]
        return {
            "input_ids": padded(ids, processor().tokenizer.pad_token_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "labels": padded([labels for _, labels in pairs], -100),
            "pixel_values": self.features,
        }


@cache
def training_batches(seed: int, steps: int, size: int) -> tuple[Batch, ...]:
    """Draw the batches, the same for every method, one question of any kind a picture."""
    rng = np.random.default_rng([seed, 9])
    first = FIRST_TRAINING_PICTURE + seed * 100_000
    return tuple(
        _batch([picture(number, "train") for number in range(start, start + size)], rng)
        for start in range(first, first + steps * size, size)
    )


def _batch(drawn: Sequence[Picture], rng: np.random.Generator) -> Batch:
    return Batch(features(drawn), tuple(_row(one, rng) for one in drawn))


def _row(drawn: Picture, rng: np.random.Generator) -> dict[str, Any]:
    asked = asked_about(drawn, int(rng.integers(1 << 30)))
    return conversation([asked[int(rng.integers(len(asked)))]], "", "drawn")


def fine_tune(model: Any, seed: int, options: argparse.Namespace) -> float:
    """Train projector and decoder; return the mean loss of the last tenth of the steps."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, options.steps))
    losses = []
    batches = training_batches(seed, options.steps, options.batch)
    for batch in tqdm(batches, desc="training", leave=False, mininterval=5):
        loss = model(**batch.inputs()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def rate_at(step: int, steps: int) -> float:
    """Return the factor of the rate at a step: a warm-up of a tenth, then a cosine."""
    warm_up = max(1, steps // 10)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
