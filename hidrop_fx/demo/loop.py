"""One optimizer run: warm-up and cosine, clipping, and a file to resume from."""

import math
from pathlib import Path

import torch
from torch import nn


class Run:
    """The parameters of ``module`` under AdamW for ``steps`` updates."""

    def __init__(self, module: nn.Module, steps: int, peak: float, warm_up: int = 100) -> None:
        self.module = module
        self.parameters = [one for one in module.parameters() if one.requires_grad]
        self.steps, self.peak, self.warm_up = steps, peak, warm_up
        self.step = 0
        wide = [one for one in self.parameters if one.ndim > 1]
        narrow = [one for one in self.parameters if one.ndim <= 1]
        groups = [{"params": wide, "weight_decay": 0.05}, {"params": narrow, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))

    def rate(self) -> float:
        """Return the learning rate of the next update."""
        warm = min(1.0, (self.step + 1) / self.warm_up)
        return self.peak * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * self.step / self.steps)))

    def update(self, loss: torch.Tensor) -> None:
        """Take one optimizer step on ``loss``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1


def store(run: Run, path: Path) -> None:
    """Write the run's state, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    state = {
        "step": run.step,
        "module": run.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    torch.save(state, fresh)
    fresh.replace(path)


def restore(run: Run, path: Path) -> None:
    """Continue from ``path`` if it is there."""
    if path.exists():
        state = torch.load(path, weights_only=True)
        run.module.load_state_dict(state["module"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = int(state["step"])
