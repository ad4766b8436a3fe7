"""What learned ratios need of transformers' Trainer: to be saved with a checkpoint, and resumed."""

from pathlib import Path
from typing import Any

import transformers

from hidrop_fx.errors import HidropError
from hidrop_fx.runtime.binding import runtime_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.training.sidecar import read_ratios, write_sidecar


class TrainerCallback(transformers.TrainerCallback):
    """Keeps `hidrop.json` and `hidrop.safetensors` in every checkpoint, and resumes from them.

        Trainer(model=hidrop.compile(model, schedule), callbacks=[hidrop.TrainerCallback()], ...)

    Only `selection="dtopk"` has something to resume. Without the callback a resumed run starts from
    the schedule's own counts, since Trainer restores the model's state dict alone.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            runtime = _runtime(kwargs["model"])
            write_sidecar(_checkpoint(args, state), runtime.schedule, runtime.ratios)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ratios = _runtime(kwargs["model"]).ratios
        if state.global_step > 0 and ratios is not None:
            given = args.resume_from_checkpoint
            given = given if isinstance(given, str) and Path(given).is_dir() else None
            read_ratios(given or _checkpoint(args, state), ratios)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ratios, best = _runtime(kwargs["model"]).ratios, state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and ratios is not None:
            read_ratios(best, ratios)


def _runtime(model: Any) -> Runtime:
    runtime = runtime_of(model)
    if runtime is None:
        raise HidropError(
            f"hidrop_fx.TrainerCallback: this {type(model).__name__} is not compiled; pass Trainer "
            "what hidrop.compile returned, or leave the callback out"
        )
    return runtime


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
