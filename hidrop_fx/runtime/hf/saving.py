"""The schedule, and what it learned, saved beside a model's own weights."""

from typing import Any

from hidrop_fx.runtime.hf.override import Override
from hidrop_fx.training.sidecar import write_sidecar


class SavePretrained(Override):
    """`model.save_pretrained`: the schedule, and what it learned, go beside the weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.arguments(args, kwargs)
        if given.get("is_main_process", True):
            write_sidecar(given["save_directory"], self.runtime.schedule, self.runtime.ratios)
        return self.original(*args, **kwargs)
