"""`hidrop inspect`, `explain`, `compare` and `dump`: what a compiled model does with one prompt."""

from pathlib import Path
from typing import Annotated

import typer

from hidrop_fx.cli.application import FOUND_WRONG, app, print_json, show
from hidrop_fx.cli.options import AsJson, CompileOptions, spelled_out
from hidrop_fx.cli.prompts import compiled_prompt


@app.command()
@spelled_out
def inspect(options: CompileOptions, as_json: AsJson = False) -> None:
    """Answer one prompt, then show what every layer ran on and what was compiled for it.

    \b
    Example: hidrop inspect --schedule "inject=3,prune=5:48,exit=9" --backend eager
    """
    from hidrop_fx.inspection import inspect as make_report
    from hidrop_fx.inspection.compile_progress import compile_ahead

    with compiled_prompt(options, as_json) as (prompt, progress):
        compile_ahead(prompt.model, prompt.inputs, progress)
    show(make_report(prompt.model), as_json)


@app.command()
@spelled_out
def explain(options: CompileOptions, as_json: AsJson = False) -> None:
    """Tell what one prompt would do, before anything is captured or run: streams, costs, problems.

    \b
    Example: hidrop explain --prompt "Which word is at the top left?"
    """
    from hidrop_fx.inspection import explain as make_explanation

    with compiled_prompt(options, as_json) as (prompt, _):
        found = make_explanation(prompt.model, **prompt.inputs)
    show(found, as_json)
    if found.refused:
        raise typer.Exit(FOUND_WRONG)


@app.command()
@spelled_out
def compare(
    options: CompileOptions,
    reference: Annotated[
        str,
        typer.Option("--reference", metavar="NAME", help="auto, loop, transformers or program."),
    ] = "auto",
    disable: Annotated[
        list[str] | None,
        typer.Option("--disable", metavar="PASS", help="attention, kv_cache or head; repeatable."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=0, help="Tokens to decode, compared as well.")
    ] = 0,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0, help="Share of a layer's largest value.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold the compiled model against an eager run, layer by layer. Exit code 1 if it departs.

    \b
    Example: hidrop compare --backend eager
    Example: hidrop compare --schedule identity --disable attention
    """
    from hidrop_fx.inspection import compare as make_comparison
    from hidrop_fx.inspection.compile_progress import watching

    with compiled_prompt(options, as_json) as (prompt, progress):
        progress("running both sides")
        with watching(prompt.model, progress):
            found = make_comparison(
                prompt.model,
                reference=reference,
                disable=disable or (),
                new_tokens=new_tokens,
                tolerance=tolerance,
                **prompt.inputs,
            )
    show(found, as_json)
    if not found.ok:
        raise typer.Exit(FOUND_WRONG)


@app.command()
@spelled_out
def dump(
    options: CompileOptions,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where to write it.")
    ] = Path("hidrop-dump"),
    heatmap: Annotated[
        bool, typer.Option(help="Put a picture of what was kept into the report.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, then write graphs, plan, generated code and report.html to a directory.

    \b
    Example: hidrop dump --output dump --backend eager
    """
    from hidrop_fx.inspection import dump as write_dump
    from hidrop_fx.inspection import heatmap as draw
    from hidrop_fx.inspection import inspect as make_report
    from hidrop_fx.inspection.compile_progress import compile_ahead

    with compiled_prompt(options, as_json) as (prompt, progress):
        compile_ahead(prompt.model, prompt.inputs, progress)
        progress(f"writing {output}")
        pictures = []
        if heatmap and make_report(prompt.model).schedule.prune:
            pictures = draw(prompt.model, prompt.inputs, prompt.processor)
        path = write_dump(prompt.model, output, pictures=pictures)
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    if as_json:
        print_json({"directory": str(path), "files": files})
    else:
        typer.echo(f"{len(files)} files in {path}; open {path / 'report.html'} in a browser")
