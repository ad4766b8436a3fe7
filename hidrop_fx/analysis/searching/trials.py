"""Try schedules on calibration samples, through the compiler's own programs.

    trials = Trials(model, samples, reference)
    trials.run("inject=3,exit=9").kl          # nats a sample, from the full model's distribution

The decoder is captured once and the images are encoded once: a trial costs one pass over the samples, and
a rewrite of the graph where its layers are new. The model itself is neither compiled nor changed.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hidrop_fx.analysis.data.samples import Samples
from hidrop_fx.analysis.progress_bar import Tick
from hidrop_fx.errors import HidropError
from hidrop_fx.models import family_of
from hidrop_fx.options import BACKENDS, Options
from hidrop_fx.planning import Plan
from hidrop_fx.planning.batch_layout import IGNORE
from hidrop_fx.planning.geometry import depth_of
from hidrop_fx.runtime.capture_store import CaptureStore
from hidrop_fx.runtime.hf.binding import runtime_of
from hidrop_fx.runtime.programs import Made, Programs
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.schedule.schedule import Schedule

_PROGRAMS = 64
"""Programs that are kept; they hold graphs, and the model's own parameters."""


@dataclass(frozen=True)
class Outcome:
    """Damage of one schedule, sample by sample."""

    kl: tuple[float, ...]
    """KL(full model || schedule) of the next-token distribution in nats, mean over the sample's
    predicting columns."""
    right: tuple[float, ...] | None
    """1.0 where every supervised token is the likeliest one, else 0.0; None without labels."""

    @property
    def mean_kl(self) -> float:
        """Mean over the samples, in nats."""
        return sum(self.kl) / len(self.kl)

    @property
    def accuracy(self) -> float | None:
        """Share of samples answered right; None without labels."""
        return None if self.right is None else sum(self.right) / len(self.right)


class Trials:
    """Schedules of one model, run on the same samples.

    Attributes:
        reference: by batch, log-probabilities [rows, vocabulary] of the full model at its predicting
            columns, fp32 on the CPU (see `measuring`).
        passes: decoder calls made so far, one for each schedule and batch.
        done: outcomes known; a schedule in it is not run again.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Samples],
        reference: Sequence[Tensor],
        *,
        backend: str = "eager",
        shared: "Trials | None" = None,
    ) -> None:
        """Set up trials; nothing runs yet.

        Args:
            model: compiled or not.
            samples: batches, images encoded.
            reference: by batch, as the attribute.
            backend: of the programs, e.g. "eager".
            shared: other trials of the same model, whose capture and compiled bodies are reused.
        """
        self.model = model
        self.samples = list(samples)
        self.backend = backend
        self.passes = 0
        compiled = runtime_of(model)
        self._store = CaptureStore(model, Options(backend=backend))
        if compiled is not None:
            self._store.begin_with(compiled.programs.store)
        self._programs: dict[Hashable, Made] = {}
        if shared is not None:
            self._store, self._programs = shared._store, shared._programs
        self.done: dict[Schedule, Outcome] = {}
        self.reference = list(reference)

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(map(len, self.samples))

    @torch.no_grad()
    def run(self, schedule: Schedule | str, tick: Tick | None = None) -> Outcome:
        """Run every sample under a schedule; one that was tried before costs nothing.

        Args:
            schedule: a `Schedule` or its text form; of learned counts the start is run.
            tick: called with the number of samples of each finished batch.
        """
        if isinstance(schedule, str):
            schedule = Schedule.parse(schedule)
        schedule = with_counts(schedule)
        if schedule not in self.done:
            runtime = self._runtime(schedule)
            kl: list[float] = []
            right: list[float] = []
            for part, full in zip(self.samples, self.reference, strict=True):
                logits = self._logits(runtime, part)
                kl += _divergences(full, logits, part.predicting)
                if part.labels is not None:
                    right += exact_matches(logits, part.labels, part.predicting)
                if tick is not None:
                    tick(len(part))
            self.done[schedule] = Outcome(tuple(kl), tuple(right) or None)
        elif tick is not None:
            tick(self.size)
        return self.done[schedule]

    @torch.no_grad()
    def next_token_divergences(
        self, schedule: Schedule, tick: Tick | None = None
    ) -> tuple[float, ...]:
        """Return KL(schedule || full model) of the token behind each sample's prompt, in nats."""
        runtime, found = self._runtime(with_counts(schedule)), []
        for part, full in zip(self.samples, self.reference, strict=True):
            theirs = self._logits(runtime, part).log_softmax(dim=-1)
            kl = (theirs.exp() * (theirs - full)).sum(dim=-1).clamp(min=0)
            found += [float(of_sample[0]) for of_sample in _by_sample(kl, part.predicting)]
            if tick is not None:
                tick(len(part))
        return tuple(found)

    def timed(self, schedule: Schedule) -> Callable[[], None]:
        """Return a function that runs the samples under a schedule once and waits for the result."""
        runtime = self._runtime(with_counts(schedule))

        @torch.no_grad()
        def run() -> None:
            for part in self.samples:
                self._logits(runtime, part)

        return run

    def _runtime(self, schedule: Schedule) -> Runtime:
        """Make a runtime over the shared capture and bodies; it is never bound."""
        options, made = Options(backend=self.backend), Plan.of(schedule, depth_of(self.model))
        known = self._programs.setdefault(_structure(made), weakref.WeakKeyDictionary())
        while len(self._programs) > _PROGRAMS:
            self._programs.pop(next(iter(self._programs)))
        programs = Programs(self.model, made, options, store=self._store, made=known)
        return Runtime(self.model, schedule, made, options, programs)

    def _logits(self, runtime: Runtime, part: Samples) -> Tensor:
        """Compute the logits at the predicting columns: fp32 [rows, vocabulary] on the CPU."""
        self.passes += 1
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": part.ids.to(device), "use_cache": False}
        if part.mask is not None:
            inputs["attention_mask"] = part.mask.to(device)
        if part.position_ids is not None:
            inputs["position_ids"] = part.position_ids.to(device)
        if part.features:
            encoded = tuple(feature.to(device) for feature in part.features)
            inputs["mm_encoder_outputs"] = {part.kind: SimpleNamespace(pooler_output=encoded)}
        last_only = part.labels is None
        states = runtime.call(inputs, labels=part.labels, rows="last" if last_only else "all")
        hidden = states.hidden
        rows = hidden[:, 0] if last_only else hidden[part.predicting.to(hidden.device)]
        return head(self.model, rows)


def check_backend(backend: str) -> None:
    """Raise `HidropError` unless programs can be lowered through it."""
    if backend not in BACKENDS:
        raise HidropError(f"backend={backend!r}; use one of {', '.join(BACKENDS)}")


def with_counts(schedule: Schedule) -> Schedule:
    """Return the schedule with the counts of `prune` as written; those of "dtopk" are where learning starts."""
    return schedule.with_keeps(schedule.prune)


def _structure(plan: Plan) -> Hashable:
    """Return what a program may depend on: all that a schedule says but for its counts, which are inputs."""
    schedule = plan.schedule
    rules = tuple(getattr(schedule, f.name) for f in fields(schedule) if f.name != "prune")
    return rules, tuple(schedule.prune), schedule.scorer


def head(model: Any, rows: Tensor) -> Tensor:
    """Compute logits of hidden states [rows, D]: fp32 [rows, vocabulary] on the CPU."""
    logits: Tensor = model.get_output_embeddings()(rows)
    steps = family_of(model).logits
    return (logits if steps is None else steps(model, logits)).float().cpu()


def exact_matches(logits: Tensor, labels: Tensor, predicting: Tensor) -> list[float]:
    """Return, by sample, 1.0 if the likeliest token is the label at all predicting columns, else 0.0.

    Args:
        logits: [rows, vocabulary] at the true places of `predicting`.
        labels: int64 [B, L].
        predicting: bool [B, L].
    """
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    hits = logits.argmax(dim=-1) == following[predicting]
    return [float(part.all()) for part in _by_sample(hits, predicting)]


def _divergences(full: Tensor, logits: Tensor, predicting: Tensor) -> list[float]:
    theirs = logits.log_softmax(dim=-1)
    kl = (full.exp() * (full - theirs)).sum(dim=-1).clamp(min=0)
    return [float(part.mean()) for part in _by_sample(kl, predicting)]


def _by_sample(values: Tensor, predicting: Tensor) -> tuple[Tensor, ...]:
    return values.split(predicting.sum(dim=1).tolist())
