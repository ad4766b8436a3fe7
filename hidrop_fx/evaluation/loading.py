"""Load the model of an evaluation, compiled under its schedule.

loaded = load_scheduled("llava", "hidrop-64")
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidrop_fx.api import compile as hidrop_compile
from hidrop_fx.api import load, use
from hidrop_fx.demo import MODEL_DIR
from hidrop_fx.models.loading import load_model
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.sidecar import read_schedules

VANILLA = "vanilla"
"""The name of no schedule: plain Hugging Face, not compiled."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model and its processor."""

    model: Any
    processor: Any
    schedule: str | None = None
    """The name of one of several that were saved with the model; None for the default one."""

    def in_use(self) -> AbstractContextManager[Any]:
        """Return a context in which calls run under the schedule."""
        return nullcontext() if self.schedule is None else use(self.model, self.schedule)


def load_scheduled(
    pretrained: str | None = None,
    schedule: str | None = None,
    *,
    backend: str = "inductor",
    dtype: str = "auto",
    device: str | None = None,
    attention: str | None = None,
    attn_implementation: str | None = None,
) -> Loaded:
    """Load a model and compile it.

    Args:
        pretrained: a directory, or an id on the Hub; None for the shipped model.
        schedule: text for `Schedule.parse`; the name of one that was saved with the model; "vanilla" for plain Hugging
            Face. None for what was saved with the model, and plain Hugging Face where nothing was.
        backend: of `hidrop_fx.Options`.
        dtype, device, attn_implementation: as `load_model` takes them.
        attention: of `hidrop_fx.Options`; None for its default.

    Raises:
        HidropError: loading fails, or the schedule is none, or does not fit the model.
    """
    saved = _saved(pretrained)
    if schedule is not None and schedule != VANILLA and schedule not in saved:
        Schedule.parse(schedule)  # before weights are read
    model, processor = load_model(
        MODEL_DIR if pretrained is None else pretrained,
        device=device,
        dtype=dtype,
        attention=attn_implementation,
    )
    options: dict[str, Any] = {"backend": backend}
    if attention is not None:
        options["attention"] = attention
    if schedule == VANILLA or (schedule is None and not saved):
        return Loaded(model=model, processor=processor)
    if schedule is None or schedule in saved:
        assert pretrained is not None
        load(model, pretrained, **options)
        return Loaded(model=model, processor=processor, schedule=schedule)
    hidrop_compile(model, schedule, **options)
    return Loaded(model=model, processor=processor)


def _saved(pretrained: str | None) -> dict[str, Schedule]:
    """Return the schedules that were saved in a model's directory, by name."""
    if pretrained is None or not (Path(pretrained) / "hidrop.json").is_file():
        return {}
    return read_schedules(pretrained)
