"""The prompt of a command: its model and inputs, from the options or drawn for the shipped model."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidrop_fx.cli.application import check, report_progress
from hidrop_fx.cli.options import CompileOptions, PromptOptions
from hidrop_fx.errors import HidropError

logger = logging.getLogger("hidrop_fx")

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LoadedPrompt:
    """A loaded model and the inputs of one prompt."""

    model: Any
    processor: Any
    inputs: dict[str, Any]
    name: str
    images: tuple[str, ...]
    question: str
    schedule: str


@contextmanager
def compiled_prompt(
    options: CompileOptions, as_json: bool
) -> Iterator[tuple[LoadedPrompt, Progress]]:
    """Load the prompt and compile its model under the schedule, while progress is reported."""
    check(schedule_text(options.model, options.schedule), options.backend, options.lowering)
    with report_progress(as_json) as progress:
        prompt = load_prompt(options, progress)
        compile_prompt(prompt, options, lowering=options.lowering)
        yield prompt, progress


def compile_prompt(prompt: LoadedPrompt, options: PromptOptions, **more: Any) -> None:
    """Compile the model of a prompt under its schedule, with what that learned where it was saved with the model."""
    from hidrop_fx.api import compile as hidrop_compile
    from hidrop_fx.runtime.hf.binding import require_runtime
    from hidrop_fx.training.sidecar import read_ratios

    modules = _modules(prompt, options.model)
    hidrop_compile(prompt.model, prompt.schedule, backend=options.backend, modules=modules, **more)
    if options.model is not None and options.schedule in saved_schedules(options.model):
        assert options.schedule is not None
        ratios = require_runtime(prompt.model, "").ratios
        read_ratios(options.model, {options.schedule: ratios})


def _modules(prompt: LoadedPrompt, directory: str | None) -> dict[str, Any]:
    """Return the modules that the schedule reads: those saved with the model, or else grown from its own layers."""
    from hidrop_fx.runtime.hf.twig import copies_of_layers, grow_twig
    from hidrop_fx.schedule.schedule import Schedule
    from hidrop_fx.training.saved_modules import read_modules, saved_places

    schedule = Schedule.parse(prompt.schedule)
    if "twig" not in schedule.modules:
        return {}
    if directory is not None and (Path(directory) / "hidrop.json").is_file():
        places = saved_places(directory).get("twig")
        if places is not None:
            found = {"twig": copies_of_layers(prompt.model, places)}
            read_modules(directory, found)
            return dict(found)
    layer = min(schedule.prune)
    logger.warning(
        "score=%r reads a side branch, and none was saved with the model: it is made of copies of the model's own layers "
        "from %d on, which nobody has trained for it",
        schedule.score,
        layer,
    )
    return {"twig": grow_twig(prompt.model, layer=layer, freeze=False)}


def saved_schedules(model: str | None) -> dict[str, str]:
    """Return the texts of the schedules that were saved in a model's directory, by name."""
    if model is None or not (Path(model) / "hidrop.json").is_file():
        return {}
    from hidrop_fx.training.sidecar import read_schedules

    return {name: str(schedule) for name, schedule in read_schedules(model).items()}


def schedule_text(model: str | None, schedule: str | None) -> str | None:
    """Return a schedule as text; a name stands for the one that was saved under it in the model's directory."""
    return None if schedule is None else saved_schedules(model).get(schedule, schedule)


def load_prompt(options: PromptOptions, progress: Progress) -> LoadedPrompt:
    """Load the model and make the inputs of the prompt.

    Raises:
        HidropError: a model is named, but not what it is asked under which schedule; or loading fails.
    """
    from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
    from hidrop_fx.models.loading import load_model
    from hidrop_fx.models.prompts import chat_inputs, open_image

    schedule = schedule_text(options.model, options.schedule)
    if options.model is None:
        pictures, names, question = _shipped(options.image, options.prompt)
        schedule = str(SCHEDULE_FILE) if schedule is None else schedule
    else:
        given = {"--image": options.image, "--prompt": options.prompt, "--schedule": schedule}
        missing = [option for option, value in given.items() if not value]
        if missing:
            raise HidropError(
                f"{', '.join(missing)} must be given with --model; without --model the shipped model is asked"
            )
        assert options.image
        assert options.prompt is not None
        pictures = [open_image(path) for path in options.image]
        names, question = tuple(map(str, options.image)), options.prompt
    assert schedule is not None
    progress(f"loading {'the shipped model' if options.model is None else options.model}")
    model, processor = load_model(
        MODEL_DIR if options.model is None else options.model,
        device=options.device,
        dtype=options.dtype,
        attention=options.attn_implementation,
    )
    return LoadedPrompt(
        model=model,
        processor=processor,
        inputs=chat_inputs(model, processor, pictures, question),
        name="shipped" if options.model is None else options.model,
        images=names,
        question=question,
        schedule=schedule,
    )


def _shipped(
    images: Sequence[Path] | None, prompt: str | None
) -> tuple[list[Any], tuple[str, ...], str]:
    """Return images, their names and a question for the shipped model; without files, a drawn picture."""
    from hidrop_fx.demo.pictures import picture, varied_questions
    from hidrop_fx.models.prompts import open_image

    drawn = picture(0, "test")
    question = varied_questions(drawn, 0, 1)[0].sentence
    if images:
        shown = [open_image(path) for path in images]
        return shown, tuple(map(str, images)), prompt or question
    return [drawn.image], ("drawn picture 0",), prompt or question
