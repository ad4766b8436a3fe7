"""A callback of transformers' Trainer: checkpoints hold, and give back, schedule and learned ratios too."""

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from hidrop_fx.capture.sharded import is_sharded
from hidrop_fx.runtime.given_modules import given_modules
from hidrop_fx.runtime.hf.binding import require_schedules, unwrapped
from hidrop_fx.runtime.schedule_set import ScheduleSet
from hidrop_fx.training.saved_modules import read_modules, write_modules
from hidrop_fx.training.sidecar import gather_ratios, gather_sharded, read_ratios, write_sidecar

logger = logging.getLogger("hidrop_fx")

_WEIGHTS = "model.safetensors"


class TrainerCallback(transformers.TrainerCallback):
    """Keeps `hidrop.json` and `hidrop.safetensors` in every checkpoint, and resumes from them.

        Trainer(model=hidrop.compile(model, schedule), callbacks=[hidrop.TrainerCallback()], ...)

    Without it a resumed run, or one with `load_best_model_at_end`, goes on from the schedule's own
    counts, since Trainer restores the model's state dict alone. Of a LLaVA not even that: it saves
    weights under their published names, which Trainer does not find again; the callback reads them.

    Where `fully_shard` shards the model (`fsdp=True`), every process has its part of the ratios, and they are
    gathered behind each step: Trainer saves in one process alone.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedules = _schedules(kwargs["model"])
        if not state.is_world_process_zero:
            gather_ratios(schedules.contents())
            return
        write_sidecar(_checkpoint(args, state), schedules.contents())
        write_modules(_checkpoint(args, state), given_modules(schedules.default.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gather_sharded(_schedules(kwargs["model"]).contents())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _schedules(kwargs["model"]).step = None  # that of a run that was interrupted
        if state.global_step > 0:
            given = args.resume_from_checkpoint
            given = given if isinstance(given, str) and Path(given).is_dir() else None
            _restore(kwargs["model"], Path(given or _checkpoint(args, state)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _restore(kwargs["model"], Path(state.best_model_checkpoint))
        gather_sharded(_schedules(kwargs["model"]).contents())


def _restore(model: Any, checkpoint: Path) -> None:
    contents, target = _schedules(model).contents(), unwrapped(model)
    # Sharded weights are there: Trainer reads a file of accelerate's, in which they have the names of the model.
    if not is_sharded(target) and not _names(checkpoint) <= target.state_dict().keys():
        logger.info("reading the weights of %s by their published names", checkpoint)
        saved = type(target).from_pretrained(checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())
    read_modules(checkpoint, given_modules(target))
    read_ratios(checkpoint, {name: ratios for name, (_, ratios) in contents.items()})


def _names(checkpoint: Path) -> set[str]:
    """Names of the weights in a checkpoint; none where an adapter alone was saved."""
    index = checkpoint / f"{_WEIGHTS}.index.json"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not (checkpoint / _WEIGHTS).is_file():
        return set()
    with safe_open(checkpoint / _WEIGHTS, framework="pt") as weights:
        return set(weights.keys())


def _schedules(model: Any) -> ScheduleSet:
    return require_schedules(
        model,
        "hidrop_fx.TrainerCallback needs what hidrop.compile returned: pass it to Trainer, or leave the "
        "callback out",
    )


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
