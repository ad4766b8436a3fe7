"""Options that several commands share, and the dataclasses that commands take them in.

    @app.command()
    @spelled_out
    def inspect(options: CompileOptions, as_json: AsJson = False) -> None: ...

`spelled_out` gives typer one parameter for each field of the dataclass.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_SPEC = 'A preset ("hidrop-64"), a JSON file, or "inject=8,prune=10:215+14:10,exit=24"; or the name of one that was saved with --model.'
_SHIPPED = "Default: the small model that is shipped, and a picture and question for it."

ScheduleText = Annotated[str, typer.Option("--schedule", metavar="SPEC", help=_SPEC)]
OptionalSchedule = Annotated[str | None, typer.Option("--schedule", metavar="SPEC", help=_SPEC)]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help=f"A directory or an id on the Hub. {_SHIPPED}"),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="May be given several times."),
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="The question, without <image>.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Default: the GPU if there is one.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.")
]
Attention = Annotated[
    str | None, typer.Option("--attn-implementation", metavar="NAME", help="As in transformers.")
]
BackendName = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="inductor, aot_eager or eager.")
]
LoweringName = Annotated[
    str | None, typer.Option("--lowering", metavar="NAME", help="bodies or whole.")
]
DataFile = Annotated[
    Path | None,
    typer.Option("--data", metavar="PATH", help="A LLaVA-format JSON file, or a folder of images."),
]
DataImages = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", help="Where the images of a JSON file are."),
]
DataPrompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='Of a folder: a question a line, or "image<TAB>question". Default: prompts.txt in it.',
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Options that name a model, one prompt and a schedule; all may be left out."""

    model: ModelName = None
    image: Images = None
    prompt: Prompt = None
    schedule: OptionalSchedule = None
    device: Device = None
    dtype: Dtype = "auto"
    attn_implementation: Attention = None
    backend: BackendName = "inductor"


@dataclass(frozen=True, kw_only=True)
class CompileOptions(PromptOptions):
    """The options of a prompt, and how its programs are lowered."""

    lowering: LoweringName = None


def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `options`, a dataclass, by one parameter for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    kind = hints.pop("options")
    field_hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=field_hints[field.name],
        )
        for field in fields(kind)
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        options = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(options, **given)

    with_options.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    with_options.__annotations__ = field_hints | hints
    return with_options
