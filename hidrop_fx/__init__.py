"""hidrop_fx: a compiler that lets vision tokens enter late, get pruned and leave early.

import hidrop_fx as hidrop

model = hidrop.compile(model, hidrop.Schedule.preset("hidrop-64"))
model.generate(**inputs)
print(hidrop.inspect(model))
hidrop.dump(model, "dump")
"""

from typing import TYPE_CHECKING, Any

from hidrop_fx.analysis import Calibration, calibrate
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
from hidrop_fx.inspection import (
    Comparison,
    Explanation,
    Inspection,
    Replay,
    compare,
    dump,
    explain,
    heatmap,
    inspect,
    replay,
)
from hidrop_fx.planning.plan import Plan, plan
from hidrop_fx.program.program import PassResult, Program
from hidrop_fx.runtime.artifacts import load_compiled, save_compiled
from hidrop_fx.runtime.warm_up import Shape, warmup
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.version import __version__

if TYPE_CHECKING:
    from hidrop_fx.runtime.hf.trainer_callback import TrainerCallback

__all__ = [
    "CacheError",
    "Calibration",
    "CaptureError",
    "Comparison",
    "Explanation",
    "HidropError",
    "InputError",
    "Inspection",
    "PassError",
    "PassResult",
    "Plan",
    "Program",
    "Replay",
    "Schedule",
    "ScheduleError",
    "Shape",
    "TrainerCallback",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "compare",
    "compile",
    "dump",
    "explain",
    "heatmap",
    "inspect",
    "is_compiled",
    "load",
    "load_compiled",
    "plan",
    "replay",
    "restore",
    "save",
    "save_compiled",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """What only a trainer needs, imported when it is asked for."""
    if name != "TrainerCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hidrop_fx.runtime.hf.trainer_callback import TrainerCallback

    return TrainerCallback
