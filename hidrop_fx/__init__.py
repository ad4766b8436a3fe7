"""hidrop_fx: a compiler that lets vision tokens enter late, get pruned and leave early.

import hidrop_fx as hidrop

model = hidrop.compile(model, hidrop.Schedule.preset("hidrop-64"))
model.generate(**inputs)
print(hidrop.inspect(model))
"""

from hidrop_fx.analysis import Calibration, calibrate
from hidrop_fx.api import compile, is_compiled, restore
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

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "Calibration",
    "CaptureError",
    "HidropError",
    "InputError",
    "Inspection",
    "PassError",
    "Plan",
    "Schedule",
    "ScheduleError",
    "UnsupportedModelError",
    "calibrate",
    "compile",
    "inspect",
    "is_compiled",
    "plan",
    "restore",
]
