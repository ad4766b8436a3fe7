"""First stage: teach the vision tower to say, at every patch, what its cell holds and where it is."""

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from hidrop_fx.demo import batches
from hidrop_fx.demo.build import TOWER_WIDTH
from hidrop_fx.demo.loop import Run, restore, store

HEADS = ("value", "colour", "row", "column")


class PatchHeads(nn.Module):
    """Linear read-outs of the tower's patch features, thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in batches.LABEL_SIZES)

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Map features [B, 144, D] to logits [B, 144, classes], one tensor a head."""
        normal = self.norm(features)
        return [head(normal) for head in self.heads]


def tower_features(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return the last layer's patch states without the class token, [B, 144, D]."""
    states: torch.Tensor = tower(pixels).last_hidden_state
    return states[:, 1:]


def train_tower(tower: nn.Module, output: Path, steps: int, batch: int) -> None:
    """Train the tower in place on fresh pictures, resuming from ``output/tower.pt``."""
    heads = PatchHeads(TOWER_WIDTH)
    run = Run(nn.ModuleDict({"tower": tower, "heads": heads}), steps, peak=1.5e-3)
    checkpoint = output / "tower.pt"
    restore(run, checkpoint)
    left = steps - run.step
    bar = tqdm(
        batches.drawn_ahead(run.step * batch, left, batch, "train"),
        total=left,
        desc="tower",
        mininterval=5,
    )
    for drawn in bar:
        outputs = heads(tower_features(tower, batches.pixel_values(drawn)))
        labels = batches.patch_labels(drawn)
        losses = [
            nn.functional.cross_entropy(logits.flatten(0, 1), labels[..., index].flatten())
            for index, logits in enumerate(outputs)
        ]
        run.update(torch.stack(losses).sum())
        if run.step % 100 == 0:
            bar.write(f"tower {run.step}: " + " ".join(f"{loss:.3f}" for loss in losses))
        if run.step % 250 == 0 or run.step == steps:
            store(run, checkpoint)
            bar.write(f"tower {run.step}: {tower_accuracy(tower, heads)}")


@torch.no_grad()
def tower_accuracy(tower: nn.Module, heads: PatchHeads, pictures: int = 100) -> dict[str, float]:
    """Return the share of held-out non-empty cells read right from their four middle patches together."""
    drawn = batches.draw(range(pictures), "test")
    labels = batches.patch_labels(drawn)
    middle = batches.middle_patches()
    right: dict[str, float] = {}
    for index, logits in enumerate(heads(tower_features(tower, batches.pixel_values(drawn)))):
        guess = logits[:, middle].log_softmax(-1).mean(2).argmax(-1)
        truth = labels[:, middle][:, :, 0]
        hits = (guess == truth[..., index]).float()
        if index == 0:
            digits = truth[..., 0] < 10
            right["digit"] = float(hits[digits].mean())
            right["other"] = float(hits[~digits].mean())
        else:
            right[HEADS[index]] = float(hits.mean())
    return {name: round(share, 4) for name, share in right.items()}
