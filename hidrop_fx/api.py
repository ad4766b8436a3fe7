"""The public functions: compile, restore, is_compiled, save, load."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hidrop_fx.capture.quantised import refuse_bitsandbytes
from hidrop_fx.errors import HidropError, ScheduleError, UnsupportedModelError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.models import backbone_of, family_of
from hidrop_fx.ops.packed_attention import check_attention
from hidrop_fx.options import Options
from hidrop_fx.pipeline.custom_passes import checked_passes
from hidrop_fx.planning import Plan
from hidrop_fx.program.program import Pass
from hidrop_fx.program.tracing import DEBUG_VARIABLE
from hidrop_fx.runtime.hf.binding import bind, runtime_of, unbind, unwrapped
from hidrop_fx.runtime.runtime import Runtime
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
    """Make a vision-language model run under a schedule; the same object is returned.

    Capture and compilation happen at the first call. `generate`, `forward`, `save_pretrained` and the
    state dict go on working; `hidrop_fx.restore(model)` undoes it. Hooks inside the text decoder do
    not run while it is compiled.

    Args:
        model: a transformers VLM, e.g. `LlavaForConditionalGeneration`, on one device.
        schedule: when vision tokens enter, are pruned and leave; a `Schedule`, or what
            `Schedule.parse` takes (a preset name is scaled to the model's depth).
        backend: "inductor"; "aot_eager" (AOTAutograd without code generation) and "eager" (the
            rewritten graph, uncompiled) rule a stage out when something is wrong.
        lowering: "bodies" compiles equal layers once, "whole" the program as one graph; None takes
            what measured best for each program.
        attention: "sdpa", PyTorch's choice of kernel; on CUDA in 16 bit also "varlen" (PyTorch) and
            "flash_attn" (the package), which spend nothing on the padding of a batch. Of prefill and
            training; layers with a sliding window that matters, and attention dropout, keep "sdpa".
        activation_memory_budget: in training, the share in (0, 1] of a layer's activations that are
            kept for backward; the rest is computed again (PyTorch's option of this name).
        cuda_graphs: record prefill, decode, and forward and backward of training, once for each set of
            shapes, on static buffers, and replay them. On a CPU the same runner makes plain calls.
        bucket_multiple: with `cuda_graphs`, text is padded to a multiple of so many tokens, and images
            where they vary in size, so that few sets of shapes occur.
        max_graphs: how many recordings are kept; the one that was not used for longest goes first.
        on_new_shape: what happens to a call that would have to be compiled or recorded first:
            "compile" does so, "eager" runs it without, and logs a line, "error" raises an `InputError`.
            `hidrop_fx.warmup` compiles and records ahead.
        overlap_vision: run the vision tower beside the layers before the injection, on a CUDA stream of
            its own, where all images have one size; None does so on CUDA. On a CPU it runs first.
        passes: rewrites of your own, `def my_pass(program, plan) -> PassResult`, run in this order in
            every program (`program.kind` tells which), after the built-in passes that decide on tokens
            and before those that decide how attention runs. What they add to `program.returns` is
            found in the output's `pass_outputs`. See docs/passes.md.

    A PEFT model is taken too; the model inside is compiled, and the PEFT model returned. A compiled
    model takes the new schedule and options; under an equal schedule its learned ratios stay.

    Raises:
        UnsupportedModelError: no such model can be compiled; says what is missing.
        ScheduleError: the schedule does not fit the model's depth.
        PassError: `passes` holds what is no pass. What a pass does wrong is raised at the first call.
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
        passes=checked_passes(passes),
    )
    wrapper, target = model, unwrapped(model)
    family_of(target)
    backbone_of(target)
    _on_one_device(target)
    _with_fixed_rope(target)
    check_attention(attention, target.device, target.dtype)
    refuse_bitsandbytes(target.get_decoder())
    layers: int = target.config.get_text_config().num_hidden_layers
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, num_layers=layers)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule is a {type(schedule).__name__}; pass a hidrop_fx.Schedule, or a string such as "
            '"hidrop-64" or "inject=8,prune=10:215+14:10,exit=24"'
        )
    plan = Plan.of(schedule, layers)
    if "forward" in target.__dict__ and not is_compiled(target):
        logger.warning(
            "model.forward was replaced on this object; the compiled one takes its place"
        )
    runtime = Runtime(target, schedule, plan, options)
    runtime.programs.on_program.append(partial(_dump_for_debugging, runtime))
    before = runtime_of(target)
    ratios = None
    if before is not None:
        logger.info("the model was compiled already; its schedule is replaced by %s", schedule)
        runtime.programs.share_captures(before.programs)
        ratios = _ratios_to_keep(before, schedule)
        unbind(target)
    bind(target, runtime, wrapper, ratios)
    return model


def restore(model: Model) -> Model:
    """Remove every override from a compiled model and return it; its own forward runs again.

    Learned ratios go with the schedule: save them before.

    Raises:
        HidropError: the model is not compiled.
    """
    _runtime(model, "there is nothing to restore")
    unbind(unwrapped(model))
    return model


def save(model: object, directory: str | Path) -> None:
    """Write the schedule, and what it learned, as `hidrop.json` and `hidrop.safetensors`.

    `save_pretrained` does so too; a PEFT model made after `compile` saves its adapters alone.

    Raises:
        HidropError: the model is not compiled.
    """
    runtime = _runtime(model, "there is no schedule to save")
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
    ratios = _runtime(model, "").ratios
    if ratios is not None:
        read_ratios(directory, ratios)
    return model


def is_compiled(model: object) -> bool:
    """Return True if `hidrop_fx.compile` is in force on this very object."""
    return runtime_of(model) is not None


def _ratios_to_keep(before: Runtime, schedule: Schedule) -> Ratios | None:
    """Return the learned ratios if the schedule is the same: an optimizer may hold them."""
    if before.ratios is None or before.schedule == schedule:
        return before.ratios
    logger.warning(
        "the ratios learned under %s go with it; hidrop.save(model, directory) keeps them",
        before.schedule,
    )
    return None


def _runtime(model: object, consequence: str) -> Runtime:
    runtime = runtime_of(model)
    if runtime is None:
        raise HidropError(f"this {type(model).__name__} is not compiled; {consequence}")
    return runtime


def _dump_for_debugging(runtime: Runtime, made: Executable) -> None:
    """Dump a model that has just made a program, where the environment names a directory for it."""
    directory = os.environ.get(DEBUG_VARIABLE)
    if directory:
        from hidrop_fx.inspection.dumps.folder import dump_for_debugging

        dump_for_debugging(runtime, directory)


def _with_fixed_rope(model: Any) -> None:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"rope_type={rope['rope_type']!r} changes its frequencies with the length of the prompt, "
            "which one captured graph cannot; use a model with default, linear, llama3 or yarn RoPE"
        )


def _on_one_device(model: Any) -> None:
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model is spread over {sorted(map(str, devices))}; a compiled model runs on one "
            "device. Load it with device_map={'': 0}, or without device_map"
        )
