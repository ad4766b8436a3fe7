"""`hidrop bench`."""

from typing import Annotated, Any

import typer

from hidrop_fx.cli.application import app, print_json
from hidrop_fx.cli.options import AsJson, CompileOptions, spelled_out
from hidrop_fx.cli.prompts import compiled_prompt


@app.command()
@spelled_out
def bench(
    options: CompileOptions,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=2, help="Length of the answer that is timed.")
    ] = 32,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Runs a median is taken of.")
    ] = 5,
    as_json: AsJson = False,
) -> None:
    """Time one prompt with plain Hugging Face and under a schedule: first token, decode, KV cache.

    \b
    Example: hidrop bench --new-tokens 16 --backend eager
    """
    from hidrop_fx.api import restore
    from hidrop_fx.inspection import inspect, measure
    from hidrop_fx.inspection.compile_progress import compile_ahead

    with compiled_prompt(options, as_json) as (prompt, progress):
        compile_ahead(prompt.model, prompt.inputs, progress)
        progress("timing the schedule")
        ours = measure(prompt.model, prompt.inputs, new_tokens=new_tokens, repeats=repeats)
        report = inspect(prompt.model)
        restore(prompt.model)
        progress("timing the plain Hugging Face model")
        theirs = measure(prompt.model, prompt.inputs, new_tokens=new_tokens, repeats=repeats)
    found: dict[str, Any] = {
        "model": prompt.name,
        "schedule": report.schedule.to_dict(),
        "backend": options.backend,
        "hf": theirs.to_dict(),
        "hidrop": ours.to_dict(),
        "token_layer_ratio": report.plan.token_layer_ratio,
        "compile_seconds": report.compile_seconds,
        "fallbacks": list(report.fallbacks),
    }
    if as_json:
        print_json(found)
    else:
        from hidrop_fx.demo.rendering import print_measurements, stdout_console

        print_measurements(report, theirs, ours, stdout_console())
