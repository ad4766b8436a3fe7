"""The public functions: compile, restore, is_compiled, save, load."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hidrop_fx.capture.admission import check_capturable
from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.models import backbone_of, family_of
from hidrop_fx.models.frozen import check_reads
from hidrop_fx.models.items import check_units
from hidrop_fx.models.tower_tokens import check_reduction
from hidrop_fx.ops.packed_attention import check_attention
from hidrop_fx.options import Options
from hidrop_fx.planning import Plan
from hidrop_fx.planning.geometry import largest_image, vision_tokens_per_image
from hidrop_fx.program.pass_function import Pass
from hidrop_fx.program.tracing import DEBUG_VARIABLE
from hidrop_fx.runtime.axes import check_positions
from hidrop_fx.runtime.deepstack import check_deepstack
from hidrop_fx.runtime.hf.binding import (
    bind,
    check_owner,
    require_runtime,
    runtime_of,
    unbind,
    unwrapped,
)
from hidrop_fx.runtime.hf.replaced import foreign_forward
from hidrop_fx.runtime.runtime import RATIOS, Runtime
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.ratios import Ratios
from hidrop_fx.training.sidecar import read_ratios, read_schedule, write_sidecar

logger = logging.getLogger("hidrop_fx")

Model = TypeVar("Model")


def compile(
    model: Model,
    schedule: Schedule | str,
    *,
    backend: str = "inductor",
    lowering: str | None = None,
    attention: str = "sdpa",
    activation_memory_budget: float | None = None,
    cuda_graphs: bool = False,
    bucket_multiple: int = 64,
    max_graphs: int = 64,
    on_new_shape: str = "compile",
    overlap_vision: bool | None = None,
    passes: Sequence[Pass] = (),
) -> Model:
    """Compile a vision-language model under a schedule and return it, the same object.

    Capture and compilation happen at the first call. `generate`, `forward`, `save_pretrained` and the
    state dict keep working; `hidrop_fx.restore(model)` undoes it. Hooks inside the text decoder do
    not run while it is compiled.

    Args:
        model: a transformers VLM, e.g. `LlavaForConditionalGeneration`, on one device.
        schedule: when vision tokens enter, are pruned and leave: a `Schedule`, or a text for
            `Schedule.parse` (a preset name is scaled to the model's depth).
        backend, lowering, ...: the fields of `hidrop_fx.Options`, where each is documented.

    Of a PEFT model the model inside is compiled, and the PEFT model is returned. A compiled model takes
    the new schedule and options; under an equal schedule its learned ratios stay.

    Raises:
        UnsupportedModelError: this model cannot be compiled; the message names what is missing.
        ScheduleError: the schedule does not fit the model's depth.
        HidropError: an option has no such value.
        PassError: `passes` holds an object that is no pass. Errors inside a pass are raised at the first
            call.
    """
    options = Options(
        backend=backend,
        lowering=lowering,
        attention=attention,
        activation_memory_budget=activation_memory_budget,
        cuda_graphs=cuda_graphs,
        bucket_multiple=bucket_multiple,
        max_graphs=max_graphs,
        on_new_shape=on_new_shape,
        overlap_vision=overlap_vision,
        passes=passes,
    )
    wrapper, target = model, unwrapped(model)
    family = family_of(target)
    backbone_of(target)
    _check_one_device(target)
    _check_rope(target)
    check_attention(attention, target.device, target.dtype)
    check_capturable(target, target.get_decoder())
    layers: int = target.config.get_text_config().num_hidden_layers
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, num_layers=layers)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule is a {type(schedule).__name__}; pass a hidrop_fx.Schedule, or a string such as "
            '"hidrop-64" or "inject=8,prune=10:215+14:10,exit=24"'
        )
    check_positions(family, schedule)
    check_deepstack(target, schedule)
    check_units(target, family, schedule)
    check_reduction(target, family, schedule.reduction)
    check_reads(target, family, schedule)
    plan = Plan.of(schedule, layers)
    _check_learned_keeps(target, schedule)
    check_owner(target)
    foreign = foreign_forward(target)
    if foreign is not None and not is_compiled(target):
        logger.warning(
            "model.forward was replaced before, by %s; the compiled one takes its place, and what it did "
            "besides (autocast, moving weights) is not done. Compile first, and let others wrap the "
            "compiled model",
            foreign,
        )
    runtime = Runtime(target, schedule, plan, options)
    runtime.on_program.append(_dump_for_debugging)
    before = runtime_of(target)
    ratios = None
    if before is not None:
        logger.info("the model was compiled already; its schedule is replaced by %s", schedule)
        runtime.programs.share_captures(before.programs)
        ratios = _ratios_to_keep(before, schedule)
        unbind(target, wrapper)
    bind(target, runtime, wrapper, ratios)
    return model


def restore(model: Model) -> Model:
    """Remove every override from a compiled model and return it; its own forward runs again.

    A forward that another library put around the compiled one, as accelerate does in mixed precision,
    stays, and wraps the model's own from then on. Learned ratios go with the schedule: save them before.

    Raises:
        HidropError: the model is not compiled.
    """
    require_runtime(model, "there is nothing to restore")
    unbind(unwrapped(model), model)
    return model


def save(model: object, directory: str | Path) -> None:
    """Write the schedule, and what it learned, as `hidrop.json` and `hidrop.safetensors`.

    `save_pretrained` does so too; a PEFT model made after `compile` saves its adapters alone.

    Raises:
        HidropError: the model is not compiled.
    """
    runtime = require_runtime(model, "there is no schedule to save")
    write_sidecar(directory, runtime.schedule, runtime.ratios)


def load(model: Model, directory: str | Path, **options: Any) -> Model:
    """Compile a model under the schedule that was saved with it, with the ratios it learned.

    Args:
        directory: where `save_pretrained`, a Trainer checkpoint or `save` wrote `hidrop.json`.
        options: as for `compile`. A model that is compiled under this schedule stays as it is.

    Raises:
        HidropError: nothing was saved there.
    """
    schedule = read_schedule(directory)
    runtime = runtime_of(model)
    if runtime is None or runtime.schedule != schedule or options:
        compile(model, schedule, **options)
    ratios = require_runtime(model, "").ratios
    if ratios is not None:
        read_ratios(directory, ratios)
    return model


def is_compiled(model: object) -> bool:
    """Return True if `hidrop_fx.compile` is in force on this very object."""
    return runtime_of(model) is not None


def _ratios_to_keep(before: Runtime, schedule: Schedule) -> Ratios | None:
    """Return the learned ratios if the schedule is the same: an optimizer may hold them."""
    found: Ratios | None = getattr(before.model, RATIOS, None)
    if found is None or before.schedule == schedule:
        return found
    logger.warning(
        "the ratios learned under %s go with it; hidrop.save(model, directory) keeps them",
        before.schedule,
    )
    return None


def _dump_for_debugging(runtime: Runtime) -> None:
    """Dump a model that has just made a program, where the environment names a directory for it."""
    directory = os.environ.get(DEBUG_VARIABLE)
    if directory:
        from hidrop_fx.inspection.dumps.folder import dump_for_debugging

        dump_for_debugging(runtime, directory)


def _check_learned_keeps(model: Any, schedule: Schedule) -> None:
    """Raise `ScheduleError` where learned ratios cannot start at counts, since images have any number of tokens."""
    if not schedule.learns or vision_tokens_per_image(model) is not None:
        return
    for layer, keep in schedule.prune.items():
        if isinstance(keep, int) or largest_image(model) is None:
            raise ScheduleError(
                f"selection={schedule.selection!r} starts from the share of an image that prune layer {layer} keeps, "
                f"but keeps {keep} of images that vary in their number of tokens; write keeps as fractions of "
                "images, with a vision tower of which hidrop_fx knows the patches (CLIP, SigLIP, DINOv2, Pixtral)"
            )


def _check_rope(model: Any) -> None:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [each for each in rope.values() if isinstance(each, dict)]
    for kind in (each.get("rope_type") for each in (rope, *by_layer_type)):
        if kind in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"rope_type={kind!r} changes its frequencies with the length of the prompt, "
                "which one captured graph cannot; use a model with default, linear, llama3 or yarn RoPE"
            )


def _check_one_device(model: Any) -> None:
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model is spread over {sorted(map(str, devices))}; a compiled model runs on one "
            "device. Load it with device_map={'': 0}, or without device_map"
        )
