"""Model and samples that a calibration tries schedules on.

    bench = Workbench(model, samples, backend="eager")
    bench.search.run(schedule), bench.held_out.run(schedule)

Every fourth sample is held out: schedules are compared on the others, and reported on both.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.analysis.data.samples import Samples
from hidrop_fx.analysis.data.typical_sample import typical_sample
from hidrop_fx.analysis.searching.trials import Trials
from hidrop_fx.schedule.schedule import Schedule

_EVERY = 4
_FEWEST = 8
"""Fewer samples are not split."""
_LATENCY_RUNS = 5


class Workbench:
    """Trials on all samples, on those that are searched on, and on those held out.

    Attributes:
        held_out: None where there are fewer than 8 samples.
        timings: seconds of each timed run; a schedule in it is not timed again.
    """

    def __init__(
        self, model: Any, samples: Sequence[Samples], reference: Sequence[Tensor], backend: str
    ) -> None:
        self.model = model
        self.timings: dict[Schedule, tuple[float, ...]] = {}
        self.samples = list(samples)
        self.digest = digest(samples)
        self.typical = typical_sample(model, samples)
        self.all = Trials(model, samples, reference, backend=backend)
        self.search: Trials = self.all
        self.held_out: Trials | None = None
        count = sum(map(len, samples))
        if count >= _FEWEST:
            self.search = self._part(reference, held_out=False, backend=backend)
            self.held_out = self._part(reference, held_out=True, backend=backend)

    @property
    def passes(self) -> int:
        """Decoder calls of all trials so far."""
        parts = {id(t): t.passes for t in (self.all, self.search, self.held_out) if t is not None}
        return sum(parts.values())

    @property
    def parts(self) -> dict[str, Trials]:
        """Trials of the samples searched on, "search", and of those held out, "held_out", if any."""
        found = {"search": self.search}
        return found if self.held_out is None else found | {"held_out": self.held_out}

    def latency(self, schedule: Schedule) -> float:
        """Measure the prefill of the first sample with images, in seconds: decoder and head.

        The fastest of a few runs counts, which other work on the machine slows the least.
        """
        if schedule not in self.timings:
            self.timings[schedule] = self._timed(schedule)
        return min(self.timings[schedule])

    def _timed(self, schedule: Schedule) -> tuple[float, ...]:
        first = next(part for part in self.samples if part.features)
        row = next(r for r, count in enumerate(first.vision_counts) if count)
        one = first.take([row])
        trials = Trials(self.model, [one], [], backend=self.all.backend, shared=self.all)
        run = trials.timed(schedule)
        run()
        seconds = []
        for _ in range(_LATENCY_RUNS):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return tuple(seconds)

    def _part(self, reference: Sequence[Tensor], *, held_out: bool, backend: str) -> Trials:
        parts, rows_of_reference, first = [], [], 0
        for part, full in zip(self.samples, reference, strict=True):
            rows = [r for r in range(len(part)) if ((first + r) % _EVERY == _EVERY - 1) == held_out]
            first += len(part)
            if rows:
                pieces = full.split(part.predicting.sum(dim=1).tolist())
                parts.append(part.take(rows))
                rows_of_reference.append(torch.cat([pieces[r] for r in rows]))
        return Trials(self.model, parts, rows_of_reference, backend=backend, shared=self.all)


def digest(samples: Sequence[Samples]) -> str:
    """Return a fingerprint of tokens, labels and images: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for part in samples:
        for tensor in (part.ids, part.labels, part.valid):
            if tensor is not None:
                found.update(tensor.contiguous().numpy().tobytes())
        for feature in part.features:
            found.update(f"{tuple(feature.shape)} {float(feature.double().sum()):.4e}".encode())
    return found.hexdigest()[:16]
