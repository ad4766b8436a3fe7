"""Training under two schedules in turn: which of them an optimizer step takes, and what one learns from the other.

    kind = "fast" if draw(seed, step) < share else "full"
    loss = cross_entropy(student) + weight * temperature**2 * KL(teacher / temperature, student / temperature)

The step's number and the seed alone decide, so that all processes and micro-batches of a step, and a resumed run, agree.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hidrop_fx.schedule.schedule import Schedule

Kind = Literal["fast", "full"]


def draw(seed: int, step: int) -> float:
    """Return a number in [0, 1) for a step, the same on every machine."""
    return random.Random(f"{seed}/{step}").random()


def divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL divergence of each row, KL(teacher || student) of softmax(logits / temperature): fp32 [n].

    Args:
        student: logits [n, V].
        teacher: logits [n, V] of the same tokens.
    """
    learned = torch.log_softmax(student.float() / temperature, dim=-1)
    taught = torch.log_softmax(teacher.float() / temperature, dim=-1)
    return torch.nn.functional.kl_div(learned, taught, reduction="none", log_target=True).sum(-1)


class Parts:
    """Parts of the loss, summed over calls, as means over supervised tokens.

    Sums stay on their device until they are asked for.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def note(self, name: str, total: Tensor, tokens: Tensor) -> None:
        """Add a sum [] over tokens, and their number []."""
        both = torch.stack([total.detach().float(), tokens.to(total.device).float()])
        before = self._sums.get(name)
        self._sums[name] = both if before is None else before.to(both.device) + both

    def take(self) -> dict[str, float]:
        """Return the mean of each part since the last call, of those that there were, and begin anew."""
        sums = {name: both.tolist() for name, both in self._sums.items()}
        self._sums = {}
        return {name: total / tokens for name, (total, tokens) in sums.items() if tokens}


@dataclass(frozen=True, kw_only=True, eq=False)
class DualStep:
    """What the calls of one optimizer step do."""

    kind: Kind
    schedule: Schedule | str
    """Under which the loss is computed."""
    teacher: Schedule | str | None
    """Under which the same batch is seen without gradients first; None in steps without a lesson."""
    needs_labels: bool
    """Some steps of this training have a teacher."""
    weight: float
    temperature: float
    parts: Parts = field(default_factory=Parts)

    def lesson(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the weighted term of each token [n], from logits [n, V]; note its unweighted sum."""
        each = divergences(student, teacher, self.temperature)
        tokens = torch.tensor(float(len(each)), device=each.device)
        self.parts.note(f"kl_{self.kind}", each.sum(), tokens)
        return self.weight * self.temperature**2 * each
