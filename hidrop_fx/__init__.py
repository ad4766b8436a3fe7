"""hidrop_fx: a compiler that lets vision tokens enter late, get pruned and leave early.

import hidrop_fx as hidrop

model = hidrop.compile(model, hidrop.Schedule.preset("hidrop-64"))
model.generate(**inputs)
print(hidrop.inspect(model))
hidrop.dump(model, "dump")

A public name is imported from its module when it is first used (PEP 562): `import hidrop_fx` loads neither
torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hidrop_fx.version import __version__

if TYPE_CHECKING:
    from hidrop_fx.analysis import Calibration, calibrate
    from hidrop_fx.api import compile, is_compiled, load, relevant_to, restore, save, schedules, use
    from hidrop_fx.checkpoints import import_llava
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
        count_launches,
        dump,
        explain,
        heatmap,
        inspect,
        replay,
    )
    from hidrop_fx.methods import (
        Scorer,
        register_cache_cut,
        register_method,
        register_reducer,
        register_scorer,
    )
    from hidrop_fx.options import Options
    from hidrop_fx.planning import (
        Cluster,
        Costs,
        Device,
        Event,
        LayerTokens,
        Plan,
        Roofline,
        ScaleOut,
        Segment,
        plan,
    )
    from hidrop_fx.program.inputs import InputSpec
    from hidrop_fx.program.program import PassResult, Program
    from hidrop_fx.runtime.artifacts import load_compiled, save_compiled
    from hidrop_fx.runtime.hf.dual_training import DualTraining
    from hidrop_fx.runtime.hf.sharding import fully_shard
    from hidrop_fx.runtime.hf.trainer_callback import TrainerCallback
    from hidrop_fx.runtime.hf.twig import grow_twig, twig_model
    from hidrop_fx.runtime.warm_up import Shape, warmup
    from hidrop_fx.schedule import Schedule

__all__ = [
    "CacheError",
    "Calibration",
    "CaptureError",
    "Cluster",
    "Comparison",
    "Costs",
    "Device",
    "DualTraining",
    "Event",
    "Explanation",
    "HidropError",
    "InputError",
    "InputSpec",
    "Inspection",
    "LayerTokens",
    "Options",
    "PassError",
    "PassResult",
    "Plan",
    "Program",
    "Replay",
    "Roofline",
    "ScaleOut",
    "Schedule",
    "ScheduleError",
    "Scorer",
    "Segment",
    "Shape",
    "TrainerCallback",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "compare",
    "compile",
    "count_launches",
    "dump",
    "explain",
    "fully_shard",
    "grow_twig",
    "heatmap",
    "import_llava",
    "inspect",
    "is_compiled",
    "load",
    "load_compiled",
    "plan",
    "register_cache_cut",
    "register_method",
    "register_reducer",
    "register_scorer",
    "relevant_to",
    "replay",
    "restore",
    "save",
    "save_compiled",
    "schedules",
    "twig_model",
    "use",
    "warmup",
]

# The imports above, as data. A sub-package must not bear a public name: its import would set the
# attribute of this module to the sub-package.
_NAMES: dict[str, str] = {
    "analysis": "Calibration calibrate",
    "options": "Options",
    "api": "compile is_compiled load relevant_to restore save schedules use",
    "checkpoints": "import_llava",
    "errors": "CacheError CaptureError HidropError InputError PassError ScheduleError "
    "UnsupportedModelError",
    "inspection": "Comparison Explanation Inspection Replay compare count_launches dump explain heatmap inspect replay",
    "methods": "Scorer register_cache_cut register_method register_reducer register_scorer",
    "planning": "Cluster Costs Device Event LayerTokens Plan Roofline ScaleOut Segment plan",
    "program.inputs": "InputSpec",
    "program.program": "PassResult Program",
    "runtime.artifacts": "load_compiled save_compiled",
    "runtime.hf.dual_training": "DualTraining",
    "runtime.hf.sharding": "fully_shard",
    "runtime.hf.trainer_callback": "TrainerCallback",
    "runtime.hf.twig": "grow_twig twig_model",
    "runtime.warm_up": "Shape warmup",
    "schedule": "Schedule",
}
_MODULES: dict[str, str] = {
    name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()
}

if not TYPE_CHECKING:  # a type checker would take any attribute for granted

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of this package, on first access."""
        if name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            path = f"{__name__}.{name}"
            try:
                return import_module(path)
            except ModuleNotFoundError as error:
                if error.name != path:
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return the names that are loaded and those that can be."""
        return sorted({*globals(), *__all__})
