"""The typer application, its error handling, and what every command needs: checks, progress, output."""

import json
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hidrop_fx.errors import HidropError

FOUND_WRONG, USAGE_ERROR = 1, 2
"""Exit codes."""


class Commands(TyperGroup):
    """A command group that prints errors the user can mend as one line on stderr."""

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
    """Validate them before a model is loaded.

    Raises:
        HidropError: the schedule cannot be read, or there is no such backend or lowering.
    """
    from hidrop_fx.options import Options
    from hidrop_fx.schedule.schedule import Schedule

    if schedule is not None:
        Schedule.parse(schedule)
    Options(backend=backend, lowering=lowering)


def report_progress(as_json: bool) -> Any:
    """Return a context that reports progress on stderr: in one line on a terminal, else in lines."""
    from hidrop_fx.inspection.compile_progress import Progress

    hide_bars()  # they would tear the status line
    return Progress(lines=not as_json)


def hide_bars() -> None:
    """Turn the progress bars of transformers off, in favour of the command's own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


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


def print_json(value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Print one JSON object, or a list of some, on stdout."""
    typer.echo(json.dumps(value, indent=2))
