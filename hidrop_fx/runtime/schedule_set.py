"""The schedules of one compiled model: a runtime for each, over one capture and the same compiled bodies.

    schedules = ScheduleSet({"fast": runtime, "full": other})     # the first is the default
    with schedules.used("full"):
        schedules.current                                         # other, in this thread or task alone

A schedule that the model was not compiled with joins when it is first used, without a name.
"""

import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from hidrop_fx.errors import HidropError, ScheduleError
from hidrop_fx.methods import METHODS
from hidrop_fx.runtime.fitting import fitted
from hidrop_fx.runtime.given_modules import check_needed, given_modules
from hidrop_fx.runtime.runtime import RATIOS, Runtime
from hidrop_fx.schedule.presets import PRESETS
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.dual import DualStep
from hidrop_fx.training.ratios import Ratios

logger = logging.getLogger("hidrop_fx")

ARGUMENT = "hidrop_schedule"
"""Argument of `model(...)` and `generate` that names the schedule of one call."""

# Schedules without a name that a model keeps the programs of.
_UNNAMED = 8

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

_USED: ContextVar[Mapping["ScheduleSet", Runtime]] = ContextVar(
    "schedules in use", default=MappingProxyType({})
)


class ScheduleSet:
    """The schedules of one compiled model, and which of them is in use.

    Attributes:
        named: their runtimes by name, the default one first. They share what the first one has.
        step: what calls with gradients do in train mode where nothing else is asked for; None but in a step of
            `DualTraining`. Copies begin without.
    """

    def __init__(self, named: Mapping[str, Runtime]) -> None:
        self.named = dict(named)
        self._reset()

    def _reset(self) -> None:
        self._unnamed: dict[Schedule, Runtime] = {}
        self.step: DualStep | None = None
        self._lock = threading.RLock()
        self._blocks = 0
        """How many `used` blocks are open, in all threads."""
        for runtime in self.named.values():
            if runtime is not self.default:
                runtime.join(self.default)
        self._note_peers()

    def __getstate__(self) -> dict[str, Any]:
        return {"named": self.named}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.named = state["named"]
        self._reset()

    @property
    def default(self) -> Runtime:
        """The runtime of the schedule that runs where none is asked for."""
        return next(iter(self.named.values()))

    @property
    def current(self) -> Runtime:
        """The runtime of the schedule in use, in this thread or task."""
        found = _USED.get().get(self)
        if found is not None:
            return found
        if self._blocks:
            self._note_other_thread()
        return self.default

    @property
    def asked_for(self) -> bool:
        """True if a block, or the argument of a call, says which schedule is in use, in this thread or task."""
        return self in _USED.get()

    def schedules(self) -> dict[str, Schedule]:
        """Return the schedules by name, the default one first."""
        return {name: runtime.schedule for name, runtime in self.named.items()}

    def contents(self) -> dict[str, tuple[Schedule, Ratios | None]]:
        """Return schedules and what they learned, by name."""
        return {name: (runtime.schedule, runtime.ratios) for name, runtime in self.named.items()}

    def copied(self, model: Any) -> "ScheduleSet":
        """Return the same schedules for a shallow copy of the model, over the same captures."""
        named = {}
        for name, of in self.named.items():
            named[name] = made = Runtime(
                model, of.schedule, of.plan, of.options, name=of.name, ratios_at=of.ratios_at
            )
            made.on_program += of.on_program
        found = ScheduleSet(named)
        found.default.programs.store.begin_with(self.default.programs.store)
        return found

    def find(self, wanted: Schedule | str) -> Runtime:
        """Return the runtime of a schedule; one that is new joins.

        Args:
            wanted: a name, or a schedule, or the text of one.

        Raises:
            ScheduleError: there is no schedule of that name, or the new one does not fit the model, or learns.
        """
        if isinstance(wanted, str) and wanted in self.named:
            return self.named[wanted]
        model = self.default.model
        try:
            schedule, plan = fitted(model, wanted)
        except ScheduleError as error:
            raise ScheduleError(
                f"{wanted!r} is no schedule of this model, which has {', '.join(map(repr, self.named))}, and "
                f"cannot become one: {error}"
            ) from error
        check_needed(model, schedule, given_modules(model))
        with self._lock:
            for runtime in (*self.named.values(), *self._unnamed.values()):
                if runtime.schedule == schedule:
                    return runtime
            if schedule.learns:
                raise ScheduleError(
                    f"{schedule} learns, and must be known when an optimizer is made; give it a name: "
                    'hidrop.compile(model, {"default": ..., "learned": schedule})'
                )
            logger.info(
                "the schedule %s is new to this model: its programs are made at the first call, over the same "
                "capture and compiled layers. Name it in hidrop.compile to save it with the model",
                schedule,
            )
            made = Runtime(model, schedule, plan, self.default.options)
            made.on_program = self.default.on_program
            made.join(self.default)
            self._unnamed[schedule] = made
            self._drop_oldest()
            self._note_peers()
            return made

    @contextmanager
    def used(self, wanted: Schedule | str) -> Iterator[Schedule]:
        """Let calls within the block, in this thread or task, run under a schedule.

        Raises:
            ScheduleError: as `find` does.
        """
        runtime = self.find(wanted)
        token = _USED.set({**_USED.get(), self: runtime})
        with self._lock:
            self._blocks += 1
        try:
            yield runtime.schedule
        finally:
            with self._lock:
                self._blocks -= 1
            _USED.reset(token)

    def _drop_oldest(self) -> None:
        if len(self._unnamed) <= _UNNAMED:
            return
        oldest = next(iter(self._unnamed))
        programs = self._unnamed.pop(oldest).programs
        programs.store.leave(programs)
        self.default.evict_recordings()
        logger.info(
            "more than %d schedules without a name: the programs of %s go, and its caches end. Name those that "
            "come back in hidrop.compile",
            _UNNAMED,
            oldest,
        )

    def _note_peers(self) -> None:
        peers = (*self.named.values(), *self._unnamed.values())
        for runtime in peers:
            runtime.peers = peers

    def _note_other_thread(self) -> None:
        self.default.log_once(
            f"a call runs under the default schedule, {self.default.schedule}, while a block of hidrop.use is open "
            "in another thread: threads do not inherit it. To generate in a thread of its own, pass "
            f'{ARGUMENT}="name" to generate'
        )


def checked_names(names: Mapping[Any, object]) -> None:
    """Check the names of schedules.

    Raises:
        ScheduleError: there is none, or one is no name.
    """
    if not names:
        raise ScheduleError(
            'schedules={} names none; pass one, such as {"fast": "hidrop-64", "full": Schedule()}'
        )
    for name in names:
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise ScheduleError(
                f"the schedule's name {name!r} is no name; use letters, digits, _ and -, such as 'fast'"
            )


def check_clash(name: str, schedule: Schedule, model: Any) -> None:
    """Check that the name of a preset or a method is given to that schedule alone.

    Raises:
        ScheduleError: it is given to another.
    """
    if name not in PRESETS and name not in METHODS:
        return
    try:
        same = fitted(model, name)[0] == schedule
    except HidropError:
        same = False
    if not same:
        raise ScheduleError(
            f"the name {name!r} is that of a preset, and is given to the schedule {schedule}; choose another name"
        )


def ratios_attribute(name: str, *, default: bool) -> str:
    """Return the attribute of the model that holds the learned ratios of a schedule."""
    return RATIOS if default else f"{RATIOS}_{name}"
