"""`hidrop bench`."""

from typing import Annotated, Any

import typer

from hidrop_fx.cli.application import (
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
)
from hidrop_fx.cli.prompts import ask


@app.command()
def bench(
    model: ModelName = None,
    image: Images = None,
    prompt: Prompt = None,
    schedule: OptionalSchedule = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=2, help="Length of the answer that is timed.")
    ] = 32,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Runs a median is taken of.")
    ] = 5,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    backend: BackendName = "inductor",
    lowering: LoweringName = None,
    as_json: AsJson = False,
) -> None:
    """Time one prompt with plain Hugging Face and under a schedule: first token, decode, KV cache.

    \b
    Example: hidrop bench --new-tokens 16 --backend eager
    """
    from hidrop_fx.api import compile as hidrop_compile
    from hidrop_fx.api import restore
    from hidrop_fx.demo import session
    from hidrop_fx.inspection import inspect, measure

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
        tell("timing the schedule")
        ours = measure(asked.model, asked.inputs, new_tokens=new_tokens, repeats=repeats)
        report = inspect(asked.model)
        restore(asked.model)
        tell("timing the plain Hugging Face model")
        theirs = measure(asked.model, asked.inputs, new_tokens=new_tokens, repeats=repeats)
    found: dict[str, Any] = {
        "model": asked.name,
        "schedule": report.schedule.to_dict(),
        "backend": backend,
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
