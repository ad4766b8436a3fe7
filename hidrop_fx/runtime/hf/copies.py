"""Copies and pickles of an object with overrides: they come back with overrides of their own.

    twin = copy.deepcopy(model)                   # its own weights, runtime, schedule and ratios
    twin = pickle.loads(pickle.dumps(model))      # the same, as torch.save and a spawned process have it
    twin = copy.copy(model)                       # shared modules, as of any module; a runtime of its own

pickle makes of a bound method `getattr(object, name)`, which is the class's own; `copy.copy` leaves it bound to
the original. So an object leaves its overrides out of its state, and installs them again in the copy.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

from hidrop_fx.errors import UnsupportedModelError
from hidrop_fx.runtime.hf.override import RECORD, Body, Record, install, is_override, record_of
from hidrop_fx.runtime.runtime import Runtime


def reduced(owner: Any, runtime: Runtime, protocol: Any) -> tuple[Any, ...]:
    """Return how to make a copy, as `object.__reduce_ex__` does."""
    make, args, state, *rest = _without_overrides(owner, protocol)
    return (_unfilled, (make, args), state, *rest)


def reduced_plainly(owner: Any, runtime: Runtime, protocol: Any) -> tuple[Any, ...]:
    """Return how to make a copy without overrides, as `object.__reduce_ex__` does."""
    found = list(_without_overrides(owner, protocol))
    found[2] = {k: v for k, v in found[2].items() if k != RECORD}
    return tuple(found)


def refuse_replicas(owner: Any, runtime: Runtime) -> NoReturn:
    """Refuse to run on several GPUs in one process."""
    raise UnsupportedModelError(
        "nn.DataParallel runs replicas of a module, whose weights are no parameters and cannot be "
        "captured; run one process a GPU (torchrun, accelerate launch: DistributedDataParallel), or "
        "show this process one GPU, CUDA_VISIBLE_DEVICES=0"
    )


COPIED: dict[str, Body] = {
    "__reduce_ex__": reduced,
    "_replicate_for_data_parallel": refuse_replicas,
}
"""Overrides of an object whose copies have overrides too."""

LEFT_OUT: dict[str, Body] = {"__reduce_ex__": reduced_plainly}
"""Overrides of an object whose copies have none."""


def _without_overrides(owner: Any, protocol: Any) -> tuple[Any, ...]:
    cls: Any = type(owner)
    found = list(cls.__reduce_ex__(owner, protocol))
    record = record_of(owner)
    assert record is not None
    ours = {name for name in record.bodies if is_override(owner.__dict__.get(name))}
    found[2] = {k: v for k, v in found[2].items() if k not in ours}
    return tuple(found)


def _unfilled(make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Make a copy that installs its overrides when it is given its state."""
    made = make(*args)
    made.__dict__["__setstate__"] = MethodType(_fill, made)
    return made


def _fill(owner: Any, state: dict[str, Any]) -> None:
    del owner.__dict__["__setstate__"]
    owner.__setstate__(state)
    record = record_of(owner)
    assert record is not None
    if record.owner is not owner:
        record = _shallow(record, owner)
        owner.__dict__[RECORD] = record
    for name in record.bodies:
        found = owner.__dict__.get(name)
        if found is None or _is_own(owner, name, found):
            install(owner, name)


def _is_own(owner: Any, name: str, found: Any) -> bool:
    """Return True for the class's own method, as pickle makes of one that another library wrapped."""
    return type(found) is MethodType and found.__func__ is getattr(type(owner), name)


def _shallow(record: Record, owner: Any) -> Record:
    """Return the overrides of a shallow copy, which shares its modules with the original."""
    schedules = record.schedules
    if schedules.default.model is record.owner:
        schedules = schedules.copied(owner)
    bodies, previous = record.bodies, dict(record.previous)
    return Record(owner=owner, schedules=schedules, bodies=bodies, previous=previous)
