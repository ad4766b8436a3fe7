"""The public functions: compile, use, relevant_to, schedules, restore, is_compiled, save, load."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from hidrop_fx.capture.admission import check_capturable
from hidrop_fx.capture.layers import text_decoder
from hidrop_fx.capture.parallel_styles import writes_files
from hidrop_fx.capture.placement import home
from hidrop_fx.errors import ScheduleError, UnsupportedModelError
from hidrop_fx.models import backbone_of, family_of
from hidrop_fx.ops.packed_attention import check_attention
from hidrop_fx.options import Options
from hidrop_fx.program.pass_function import Pass
from hidrop_fx.program.tracing import DEBUG_VARIABLE
from hidrop_fx.runtime.fitting import fitted
from hidrop_fx.runtime.given_modules import check_needed, checked_modules, given_modules
from hidrop_fx.runtime.hf.binding import (
    bind,
    check_owner,
    require_runtime,
    require_schedules,
    runtime_of,
    schedules_of,
    unbind,
    unwrapped,
)
from hidrop_fx.runtime.hf.replaced import foreign_forward
from hidrop_fx.runtime.hf.twig import copies_of_layers
from hidrop_fx.runtime.relevance import given_features
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.runtime.schedule_set import (
    ScheduleSet,
    check_clash,
    checked_names,
    ratios_attribute,
)
from hidrop_fx.schedule.schedule import Schedule
from hidrop_fx.training.ratios import Ratios
from hidrop_fx.training.saved_modules import read_modules, saved_places, write_modules
from hidrop_fx.training.sidecar import DEFAULT, read_ratios, read_schedules, write_sidecar

logger = logging.getLogger("hidrop_fx")

Model = TypeVar("Model")


def compile(
    model: Model,
    schedule: Schedule | str | Mapping[str, Schedule | str],
    *,
    backend: str = "inductor",
    lowering: str | None = None,
    attention: str = "sdpa",
    activation_memory_budget: float | None = None,
    fused_loss: bool = False,
    cuda_graphs: bool = False,
    bucket_multiple: int = 64,
    max_graphs: int = 64,
    on_new_shape: str = "compile",
    overlap_vision: bool | None = None,
    passes: Sequence[Pass] = (),
    modules: Mapping[str, nn.Module] | None = None,
) -> Model:
    """Compile a vision-language model under a schedule and return it, the same object.

    Capture and compilation happen at the first call. `generate`, `forward`, `save_pretrained` and the
    state dict keep working; `hidrop_fx.restore(model)` undoes it. Hooks inside the text decoder do
    not run while it is compiled.

    Args:
        model: a transformers VLM, e.g. `LlavaForConditionalGeneration`, on one device, or on several by `device_map`.
        schedule: when vision tokens enter, are pruned and leave: a `Schedule`, or a text for
            `Schedule.parse` (a preset name is scaled to the model's depth). Or several of them by name,
            {"fast": "hidrop-64", "full": Schedule()}: the first is the default, `hidrop_fx.use` runs calls under another.
        backend, lowering, ...: the fields of `hidrop_fx.Options`, where each is documented.
        modules: what a schedule needs beside the model: {"twig": nn.ModuleList of decoder layers} for "twigvlm", {"classifier": a
            module that gives one logit for the pixels of each token} for "index-preserving". They become
            `model.hidrop_modules`, in no state dict; a compiled model keeps those that it has.

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
        fused_loss=fused_loss,
        cuda_graphs=cuda_graphs,
        bucket_multiple=bucket_multiple,
        max_graphs=max_graphs,
        on_new_shape=on_new_shape,
        overlap_vision=overlap_vision,
        passes=passes,
    )
    wrapper, target = model, unwrapped(model)
    family_of(target)
    backbone_of(target)
    _check_rope(target)
    check_attention(attention, home(text_decoder(target)), target.dtype)
    check_capturable(target, text_decoder(target))
    given = given_modules(target) | checked_modules(target, modules)
    named = _runtimes(target, schedule, options)
    for runtime in named.values():
        check_needed(target, runtime.schedule, given)
    check_owner(target)
    foreign = foreign_forward(target)
    if foreign is not None and not is_compiled(target):
        logger.warning(
            "model.forward was replaced before, by %s; the compiled one takes its place, and what it did "
            "besides (autocast, moving weights) is not done. Compile first, and let others wrap the "
            "compiled model",
            foreign,
        )
    made = ScheduleSet(named)
    for runtime in named.values():
        runtime.on_program.append(_dump_for_debugging)
    before = schedules_of(target)
    ratios: dict[str, Ratios | None] = {}
    if before is not None:
        shown = ", ".join(map(str, made.schedules().values()))
        logger.info("the model was compiled already; its schedule is replaced by %s", shown)
        made.default.programs.store.begin_with(before.default.programs.store)
        ratios = _ratios_to_keep(before, made)
        unbind(target, wrapper)
    bind(target, made, wrapper, ratios, given)
    return model


@contextmanager
def use(model: object, schedule: Schedule | str) -> Iterator[Schedule]:
    """Run the calls of a block under another schedule of a compiled model, and yield that schedule.

        with hidrop.use(model, "fast"):
            model.generate(**inputs)

    In this thread or asyncio task alone: a thread that is started within the block does not inherit it, and passes
    `hidrop_schedule="fast"` to `generate` or `model(...)`, which does the same for one call. Reports, warm-up and training
    within the block are those of the schedule. A cache goes on under the schedule of its prompt.

    Args:
        model: a compiled model.
        schedule: a name that `compile` was given; or a schedule, or its text, that the model was not compiled with: its
            programs are made at the first call, over the same capture and compiled layers.

    Raises:
        HidropError: the model is not compiled.
        ScheduleError: no schedule has that name, or it does not fit the model, or it learns and has no name.
    """
    found = require_schedules(model, "call hidrop_fx.compile first")
    with found.used(schedule) as chosen:
        yield chosen


@contextmanager
def relevant_to(model: object, features: Tensor) -> Iterator[None]:
    """Let a reducer that reads text measure relevance to given text features in the calls of a block, as `cdpruner` does.

        with hidrop.relevant_to(model, features):
            model.generate(**inputs)

    In this thread or asyncio task alone. Relevance is then the cosine of an image's projected tokens with these
    features, and not with the embeddings of the prompt's text; reducers that read no text take no notice.

    Args:
        model: a compiled model.
        features: floats [D], for all rows of a call, or [B, D], as wide as the model's image features. Beams and several
            answers have those of their row.

    Raises:
        HidropError: the model is not compiled.
        InputError: they are no such tensor; in a call, they are of another width or number of rows.
    """
    require_runtime(model, "call hidrop_fx.compile first")
    with given_features(unwrapped(model), features):
        yield


def schedules(model: object) -> dict[str, Schedule]:
    """Return the schedules that a model was compiled with, by name, the default one first.

    The name is "default" where there is one alone.

    Raises:
        HidropError: the model is not compiled.
    """
    return require_schedules(model, "it has no schedules").schedules()


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
    """Write the schedules, and what they learned, as `hidrop.json` and `hidrop.safetensors`.

    The modules that the model was compiled with go into `hidrop_modules.safetensors`.

    `save_pretrained` does so too; a PEFT model made after `compile` saves its adapters alone.

    Raises:
        HidropError: the model is not compiled.
    """
    found = require_schedules(model, "there is no schedule to save")
    if writes_files(found.default.model):
        write_sidecar(directory, found.contents())
        write_modules(directory, given_modules(found.default.model))


def load(model: Model, directory: str | Path, **options: Any) -> Model:
    """Compile a model under the schedules that were saved with it, with the ratios they learned and their modules.

    Args:
        directory: where `save_pretrained`, a Trainer checkpoint or `save` wrote `hidrop.json`.
        options: as for `compile`. A model that is compiled under this schedule stays as it is.

    Raises:
        HidropError: nothing was saved there.
    """
    saved = read_schedules(directory)
    found, target = schedules_of(model), unwrapped(model)
    modules = given_modules(target) | dict(options.pop("modules", None) or {})
    for name, places in saved_places(directory).items():
        there = len(list(modules.get(name, nn.Module()).children()))
        if places is not None and there != len(places):
            modules[name] = copies_of_layers(target, places)
    if modules and modules != given_modules(target):
        options["modules"] = modules
    if found is None or found.schedules() != saved or [*found.named] != [*saved] or options:
        compile(model, saved if [*saved] != [DEFAULT] else saved[DEFAULT], **options)
    read_modules(directory, given_modules(target))
    bound = require_schedules(model, "").contents()
    read_ratios(directory, {name: ratios for name, (_, ratios) in bound.items()})
    return model


def is_compiled(model: object) -> bool:
    """Return True if `hidrop_fx.compile` is in force on this very object."""
    return runtime_of(model) is not None


def _runtimes(
    model: Any, schedule: Schedule | str | Mapping[str, Schedule | str], options: Options
) -> dict[str, Runtime]:
    """Make a runtime for each schedule, by name.

    Raises:
        ScheduleError: one does not fit the model, or its name is none, or means another schedule.
    """
    if not isinstance(schedule, Mapping):
        single, plan = fitted(model, schedule)
        return {DEFAULT: Runtime(model, single, plan, options, name=DEFAULT)}
    checked_names(schedule)
    made: dict[str, Runtime] = {}
    for name, each in schedule.items():
        try:
            single, plan = fitted(model, each)
        except ScheduleError as error:
            raise ScheduleError(f"in the schedule {name!r}: {error}") from error
        check_clash(name, single, model)
        place = ratios_attribute(name, default=not made)
        made[name] = Runtime(model, single, plan, options, name=name, ratios_at=place)
    return made


def _ratios_to_keep(before: ScheduleSet, now: ScheduleSet) -> dict[str, Ratios | None]:
    """Return learned ratios by name, of schedules that stay: an optimizer may hold them."""
    kept: dict[str, Ratios | None] = {}
    left = {name: runtime for name, runtime in before.named.items() if runtime.schedule.learns}
    for name, runtime in now.named.items():
        of = [name, *left] if name in left else [*left]
        same = next((other for other in of if left[other].schedule == runtime.schedule), None)
        if same is not None:
            kept[name] = getattr(before.default.model, left.pop(same).ratios_at, None)
    for runtime in left.values():
        logger.warning(
            "the ratios learned under %s go with it; hidrop.save(model, directory) keeps them",
            runtime.schedule,
        )
    return kept


def _dump_for_debugging(runtime: Runtime) -> None:
    """Dump a model that has just made a program, where the environment names a directory for it."""
    directory = os.environ.get(DEBUG_VARIABLE)
    if directory:
        from hidrop_fx.inspection.dumps.folder import dump_for_debugging

        dump_for_debugging(runtime, directory)


def _check_rope(model: Any) -> None:
    for kind in _rope_types(model):
        if kind not in ("dynamic", "longrope"):
            continue
        longest = model.config.get_text_config().max_position_embeddings
        remedy = "use a model with default, linear, llama3 or yarn RoPE"
        if kind == "dynamic":
            remedy = (
                f"up to {longest} positions (max_position_embeddings) it is 'default': for prompts that are no longer, "
                'load the model with config.text_config.rope_parameters["rope_type"] = "default"'
            )
        raise UnsupportedModelError(
            f"rope_type={kind!r} changes its frequencies with the length of the prompt, which one captured graph "
            f"cannot; {remedy}"
        )


def _rope_types(model: Any) -> list[Any]:
    """Return the types of RoPE that the decoder has, as its own module names them, or else its config."""
    kinds = getattr(getattr(text_decoder(model), "rotary_emb", None), "rope_type", None)
    if kinds is not None:
        return list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [each for each in rope.values() if isinstance(each, dict)]
    return [each.get("rope_type") for each in (rope, *by_layer_type)]
