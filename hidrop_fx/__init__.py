"""hidrop_fx: a compiler that lets vision tokens enter late, get pruned and leave early.

import hidrop_fx as hidrop

model = hidrop.compile(model, hidrop.Schedule.preset("hidrop-64"))
model.generate(**inputs)
print(hidrop.inspect(model))
"""

from hidrop_fx.api import compile, is_compiled, load, restore, save
from hidrop_fx.errors import (
    CacheError,
    CaptureError,
    HidropError,
    InputError,
    PassError,
    ScheduleError,
    UnsupportedModelError,
)
from hidrop_fx.inspection import Inspection, inspect
from hidrop_fx.planning import Plan, plan
from hidrop_fx.schedule import Schedule
from hidrop_fx.training.callback import TrainerCallback
from hidrop_fx.version import __version__

__all__ = [
    "CacheError",
    "CaptureError",
    "HidropError",
    "InputError",
    "Inspection",
    "PassError",
    "Plan",
    "Schedule",
    "ScheduleError",
    "TrainerCallback",
    "UnsupportedModelError",
    "__version__",
    "compile",
    "inspect",
    "is_compiled",
    "load",
    "plan",
    "restore",
    "save",
]
