"""The public functions: compile, restore, is_compiled."""

import logging
from typing import Any, TypeVar

from hidrop_fx.errors import HidropError, ScheduleError, UnsupportedModelError
from hidrop_fx.lowering import BACKENDS, LOWERINGS
from hidrop_fx.models import backbone_of, family_of
from hidrop_fx.planning import plan
from hidrop_fx.runtime.binding import bind, runtime_of, unbind
from hidrop_fx.runtime.runtime import Options, Runtime
from hidrop_fx.schedule import Schedule

logger = logging.getLogger("hidrop_fx")

Model = TypeVar("Model")


def compile(
    model: Model,
    schedule: Schedule | str,
    *,
    backend: str = "inductor",
    lowering: str | None = None,
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

    Raises:
        UnsupportedModelError: no such model can be compiled; says what is missing.
        ScheduleError: the schedule does not fit the model's depth.
    """
    if backend not in BACKENDS:
        raise HidropError(f"backend={backend!r}; use one of {', '.join(BACKENDS)}")
    if lowering is not None and lowering not in LOWERINGS:
        raise HidropError(f"lowering={lowering!r}; use one of {', '.join(LOWERINGS)}, or None")
    family_of(model)
    backbone_of(model)
    _on_one_device(model)
    _with_fixed_rope(model)
    layers: int = model.config.get_text_config().num_hidden_layers  # type: ignore[attr-defined]
    if isinstance(schedule, str):
        schedule = Schedule.parse(schedule, num_layers=layers)
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule is a {type(schedule).__name__}; pass a hidrop_fx.Schedule, or a string such as "
            '"hidrop-64" or "inject=8,prune=10:215+14:10,exit=24"'
        )
    schedule.validate(layers)
    if "forward" in model.__dict__ and not is_compiled(model):
        logger.warning(
            "model.forward was replaced on this object; the compiled one takes its place"
        )
    runtime = Runtime(
        model, schedule, plan(schedule, model), Options(backend=backend, lowering=lowering)
    )
    if is_compiled(model):
        logger.info("the model was compiled already; its schedule is replaced by %s", schedule)
        unbind(model)
    bind(model, runtime)
    return model


def restore(model: Model) -> Model:
    """Give a compiled model its own forward back; the same object is returned.

    Raises:
        HidropError: the model is not compiled.
    """
    if not is_compiled(model):
        raise HidropError(
            f"this {type(model).__name__} is not compiled; there is nothing to restore"
        )
    unbind(model)
    return model


def is_compiled(model: object) -> bool:
    """Whether `hidrop_fx.compile` is in force on this very object."""
    return runtime_of(model) is not None


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
