"""Which model is asked what: from the options, or the shipped model with a picture and question of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidrop_fx.errors import HidropError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A model and the inputs of one prompt."""

    model: Any
    processor: Any
    inputs: dict[str, Any]
    name: str
    images: tuple[str, ...]
    prompt: str
    schedule: str


def ask(
    model: str | None,
    images: Sequence[Path] | None,
    prompt: str | None,
    schedule: str | None,
    *,
    device: str | None,
    dtype: str,
    attention: str | None,
    tell: Callable[[str], None],
) -> Asked:
    """Load the model and make the inputs."""
    from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
    from hidrop_fx.models.loading import load_model
    from hidrop_fx.models.prompts import chat_inputs, open_image

    if model is None:
        pictures, names, question = _shipped(images, prompt)
        schedule = str(SCHEDULE_FILE) if schedule is None else schedule
    else:
        given = {"--image": images, "--prompt": prompt, "--schedule": schedule}
        missing = [option for option, value in given.items() if not value]
        if missing:
            raise HidropError(
                f"{', '.join(missing)} must be given with --model; without --model the shipped model is asked"
            )
        assert images
        assert prompt is not None
        pictures = [open_image(path) for path in images]
        names, question = tuple(map(str, images)), prompt
    assert schedule is not None
    name = str(MODEL_DIR) if model is None else model
    tell(f"loading {'the shipped model' if model is None else name}")
    loaded, processor = load_model(name, device=device, dtype=dtype, attention=attention)
    return Asked(
        model=loaded,
        processor=processor,
        inputs=chat_inputs(loaded, processor, pictures, question),
        name="shipped" if model is None else name,
        images=names,
        prompt=question,
        schedule=schedule,
    )


def _shipped(
    images: Sequence[Path] | None, prompt: str | None
) -> tuple[list[Any], tuple[str, ...], str]:
    """Pictures and question for the shipped model; a drawn picture where none is given."""
    from hidrop_fx.demo import session
    from hidrop_fx.demo.pictures import picture
    from hidrop_fx.models.prompts import open_image

    drawn = picture(0, "test")
    question = session.sentence(session.some_questions(drawn, 0, 1)[0])
    if images:
        shown = [open_image(path) for path in images]
        return shown, tuple(map(str, images)), prompt or question
    return [drawn.image], ("drawn picture 0",), prompt or question
