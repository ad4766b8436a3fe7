"""The application itself, its options, and how it fails."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hidrop_fx.errors import HidropError

FOUND_WRONG, USAGE_ERROR = 1, 2


class Commands(TyperGroup):
    """Turns errors that the user can mend into one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (HidropError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(USAGE_ERROR) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_SPEC = 'A preset ("hidrop-64"), a JSON file, or "inject=8,prune=10:215+14:10,exit=24".'
_SHIPPED = "Default: the small model that is shipped, and a picture and question for it."

ScheduleText = Annotated[str, typer.Option("--schedule", metavar="SPEC", help=_SPEC)]
BackendName = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="inductor, aot_eager or eager.")
]
LoweringName = Annotated[
    str | None, typer.Option("--lowering", metavar="NAME", help="bodies or whole.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]

# The options that say which model is asked what; all may be left out.
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
OptionalSchedule = Annotated[str | None, typer.Option("--schedule", metavar="SPEC", help=_SPEC)]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Default: the GPU if there is one.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.")
]
Attention = Annotated[
    str | None, typer.Option("--attn-implementation", metavar="NAME", help="As in transformers.")
]


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from hidrop_fx.version import __version__

        typer.echo(f"hidrop-fx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Vision-language models whose vision tokens enter late, are pruned and leave early."""


def check(schedule: str | None, backend: str, lowering: str | None = None) -> None:
    """Say what is wrong with them before a model is loaded."""
    from hidrop_fx.options import BACKENDS, LOWERINGS
    from hidrop_fx.schedule.schedule import Schedule

    if schedule is not None:
        Schedule.parse(schedule)
    if backend not in BACKENDS:
        raise HidropError(f"backend={backend!r}; use one of {', '.join(BACKENDS)}")
    if lowering is not None and lowering not in LOWERINGS:
        raise HidropError(f"lowering={lowering!r}; use one of {', '.join(LOWERINGS)}")


def progress(as_json: bool) -> Any:
    """What tells of progress, on a terminal or in lines."""
    from transformers.utils.logging import disable_progress_bar

    from hidrop_fx.inspection.compile_progress import Progress

    # The bars of transformers would tear the status line.
    disable_progress_bar()
    return Progress(lines=not as_json)


def show(report: Any, as_json: bool) -> None:
    """Print a report: rich tables on a terminal, plain ones into a pipe, or JSON."""
    if as_json:
        print_json(report.to_dict())
        return
    from hidrop_fx.demo.rendering import stdout_console

    console = stdout_console()
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report))


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=2))
