"""`hidrop inspect`, `explain`, `compare` and `dump`: what a compiled model does with one prompt."""

from pathlib import Path
from typing import Annotated

import typer

from hidrop_fx.cli.application import (
    FOUND_WRONG,
    AsJson,
    Attention,
    BackendName,
    Device,
    Dtype,
    Images,
    LoweringName,
    ModelName,
    OptionalSchedule,
    Prompt,
    app,
    check,
    print_json,
    progress,
    show,
)
from hidrop_fx.cli.prompts import ask


@app.command()
def inspect(
    model: ModelName = None,
    image: Images = None,
    prompt: Prompt = None,
    schedule: OptionalSchedule = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    backend: BackendName = "inductor",
    lowering: LoweringName = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, then show what every layer ran on and what was compiled for it.

    \b
    Example: hidrop inspect --schedule "inject=3,prune=5:48,exit=9" --backend eager
    """
    from hidrop_fx.api import compile as hidrop_compile
    from hidrop_fx.demo import session
    from hidrop_fx.inspection import inspect as make_report

    check(schedule, backend, lowering)
    with progress(as_json) as tell:
        asked = ask(
            *(model, image, prompt, schedule),
            device=device,
            dtype=dtype,
            attention=attn_implementation,
            tell=tell,
        )
        hidrop_compile(asked.model, asked.schedule, backend=backend, lowering=lowering)
        session.prepare(asked.model, asked.inputs, tell)
    show(make_report(asked.model), as_json)


@app.command()
def explain(
    model: ModelName = None,
    image: Images = None,
    prompt: Prompt = None,
    schedule: OptionalSchedule = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    backend: BackendName = "inductor",
    lowering: LoweringName = None,
    as_json: AsJson = False,
) -> None:
    """Tell what one prompt would do, before anything is captured or run: streams, costs, problems.

    \b
    Example: hidrop explain --prompt "Which word is at the top left?"
    """
    from hidrop_fx.api import compile as hidrop_compile
    from hidrop_fx.inspection import explain as make_explanation

    check(schedule, backend, lowering)
    with progress(as_json) as tell:
        asked = ask(
            *(model, image, prompt, schedule),
            device=device,
            dtype=dtype,
            attention=attn_implementation,
            tell=tell,
        )
        hidrop_compile(asked.model, asked.schedule, backend=backend, lowering=lowering)
        found = make_explanation(asked.model, **asked.inputs)
    show(found, as_json)
    if found.refused:
        raise typer.Exit(FOUND_WRONG)


@app.command()
def compare(
    model: ModelName = None,
    image: Images = None,
    prompt: Prompt = None,
    schedule: OptionalSchedule = None,
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
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    backend: BackendName = "inductor",
    lowering: LoweringName = None,
    as_json: AsJson = False,
) -> None:
    """Hold the compiled model against an eager run, layer by layer. Exit code 1 if it departs.

    \b
    Example: hidrop compare --backend eager
    Example: hidrop compare --schedule identity --disable attention
    """
    from hidrop_fx.api import compile as hidrop_compile
    from hidrop_fx.inspection import compare as make_comparison
    from hidrop_fx.inspection.compile_progress import watching

    check(schedule, backend, lowering)
    with progress(as_json) as tell:
        asked = ask(
            *(model, image, prompt, schedule),
            device=device,
            dtype=dtype,
            attention=attn_implementation,
            tell=tell,
        )
        hidrop_compile(asked.model, asked.schedule, backend=backend, lowering=lowering)
        tell("running both sides")
        with watching(asked.model, tell):
            found = make_comparison(
                asked.model,
                reference=reference,
                disable=disable or (),
                new_tokens=new_tokens,
                tolerance=tolerance,
                **asked.inputs,
            )
    show(found, as_json)
    if not found.ok:
        raise typer.Exit(FOUND_WRONG)


@app.command()
def dump(
    model: ModelName = None,
    image: Images = None,
    prompt: Prompt = None,
    schedule: OptionalSchedule = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where to write it.")
    ] = Path("hidrop-dump"),
    heatmap: Annotated[
        bool, typer.Option(help="Put a picture of what was kept into the report.")
    ] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    backend: BackendName = "inductor",
    lowering: LoweringName = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, then write graphs, plan, generated code and report.html to a directory.

    \b
    Example: hidrop dump --output dump --backend eager
    """
    from hidrop_fx.api import compile as hidrop_compile
    from hidrop_fx.demo import session
    from hidrop_fx.inspection import dump as write_dump
    from hidrop_fx.inspection import heatmap as draw
    from hidrop_fx.inspection import inspect as make_report

    check(schedule, backend, lowering)
    with progress(as_json) as tell:
        asked = ask(
            *(model, image, prompt, schedule),
            device=device,
            dtype=dtype,
            attention=attn_implementation,
            tell=tell,
        )
        hidrop_compile(asked.model, asked.schedule, backend=backend, lowering=lowering)
        session.prepare(asked.model, asked.inputs, tell)
        tell(f"writing {output}")
        prunes = bool(make_report(asked.model).schedule.prune)
        pictures = draw(asked.model, asked.inputs, asked.processor) if heatmap and prunes else []
        path = write_dump(asked.model, output, pictures=pictures)
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    if as_json:
        print_json({"directory": str(path), "files": files})
    else:
        typer.echo(f"{len(files)} files in {path}; open {path / 'report.html'} in a browser")
