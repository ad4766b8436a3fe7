"""`hidrop demo` and `hidrop run`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hidrop_fx.cli.application import app, check, print_json, report_progress
from hidrop_fx.cli.options import (
    AsJson,
    BackendName,
    DataFile,
    DataImages,
    DataPrompts,
    PromptOptions,
    spelled_out,
)
from hidrop_fx.cli.prompts import compile_prompt, load_prompt, schedule_text
from hidrop_fx.distributed.processes import is_launched, take_own_gpu
from hidrop_fx.errors import HidropError


@app.command()
def demo(
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", metavar="SPEC", help="Instead of the demo's own schedule."),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=1, help="How many to ask about one picture, at most.")
    ] = 6,
    batch: Annotated[
        int, typer.Option(min=1, help="How many to ask at once, about several pictures.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Which picture to draw.")] = 0,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write it.")] = Path(
        "hidrop-demo"
    ),
    backend: BackendName = "inductor",
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another model for the same pictures.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a small LLaVA about drawn pictures, with plain Hugging Face and under a schedule.

    \b
    Example: hidrop demo --seed 4 --questions 8
    """
    from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
    from hidrop_fx.demo.session import run_demo

    check(schedule, backend)
    with report_progress(as_json) as progress:
        session = run_demo(
            str(SCHEDULE_FILE) if schedule is None else schedule,
            output=output,
            count=questions,
            batch=batch,
            seed=seed,
            backend=backend,
            directory=MODEL_DIR if model is None else model,
            progress=progress,
        )
    if as_json:
        print_json(session.to_dict())
    else:
        from hidrop_fx.demo.rendering import print_session, stdout_console

        print_session(session, stdout_console())


@app.command()
@spelled_out
def run(
    options: PromptOptions,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask plain Hugging Face, too.")
    ] = False,
    heatmap: Annotated[
        Path | None,
        typer.Option("--heatmap", metavar="FILE", help="Draw which tokens were kept, as a PNG."),
    ] = None,
    data: DataFile = None,
    images: DataImages = None,
    prompts: DataPrompts = None,
    samples: Annotated[int, typer.Option(min=1, help="Of --data, at most.")] = 1_000_000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of --data.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the answers to --data go, one JSON a line."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about images under a schedule (greedy decoding).

    With --data, the questions of a file: started by torchrun, each process answers a part of them.

    \b
    Example: hidrop run --heatmap kept.png
    Example: torchrun --nproc-per-node 8 -m hidrop_fx run --data questions.json --images images \\
                 --model llava-hf/llava-1.5-7b-hf --schedule hidrop-64 --output answers.jsonl
    Example: hidrop run --model llava-hf/llava-1.5-7b-hf --image cat.png \\
                 --prompt "What is this?" --schedule hidrop-64 --compare
    """
    from hidrop_fx.inspection import inspect, measure
    from hidrop_fx.inspection.compile_progress import compile_ahead
    from hidrop_fx.models.prompts import greedy_answer

    check(schedule_text(options.model, options.schedule), options.backend)
    if data is not None:
        take_own_gpu(options.device)
        from hidrop_fx.cli.answered_files import answer_files

        given = {
            "--image": options.image,
            "--prompt": options.prompt,
            "--compare": compare,
            "--heatmap": heatmap,
        }
        unused = [name for name, value in given.items() if value]
        if unused:
            raise HidropError(f"{', '.join(unused)} is about one prompt: leave it out with --data")
        answer_files(
            options,
            data,
            images=images,
            prompts=prompts,
            samples=samples,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            output=output,
            as_json=as_json,
        )
        return
    if is_launched():
        raise HidropError(
            "torchrun started several processes for one prompt: pass --data, whose questions they share, or start hidrop alone"
        )
    with report_progress(as_json) as progress:
        prompt = load_prompt(options, progress)
        model, processor, inputs = prompt.model, prompt.processor, prompt.inputs
        found: dict[str, Any] = {
            "model": prompt.name,
            "images": list(prompt.images),
            "prompt": prompt.question,
        }
        if compare:
            progress("asking the plain Hugging Face model")
            found["hf"] = {
                "answer": greedy_answer(model, processor, inputs, max_new_tokens),
                **measure(model, inputs, new_tokens=None, repeats=3).to_dict(),
            }
        compile_prompt(prompt, options)
        compile_ahead(model, inputs, progress, decode=max_new_tokens > 1)
        progress("answering")
        found["answer"] = greedy_answer(model, processor, inputs, max_new_tokens)
        found |= measure(model, inputs, new_tokens=None, repeats=3).to_dict()
        report = inspect(model)
        if heatmap is not None:
            progress("drawing what was kept")
            _draw(model, processor, inputs, heatmap)
            found["heatmap"] = str(heatmap)
    found |= {
        "schedule": report.schedule.to_dict(),
        "backend": options.backend,
        "tokens": [layer.tokens for layer in report.layers],
        "compile_seconds": report.compile_seconds,
        "fallbacks": list(report.fallbacks),
    }
    if as_json:
        print_json(found)
    else:
        from hidrop_fx.demo.rendering import print_answer, stdout_console

        if options.model is None:
            typer.echo(f"{prompt.images[0]}: {prompt.question}")
        print_answer(found, report, stdout_console())
        if heatmap is not None:
            typer.echo(f"heat map written to {heatmap}")


def _draw(model: Any, processor: Any, inputs: dict[str, Any], path: Path) -> None:
    from hidrop_fx.inspection.heatmaps.drawing import stacked
    from hidrop_fx.inspection.heatmaps.filter_layers import heatmap

    try:
        stacked(heatmap(model, inputs, processor)).save(path)
    except ValueError as error:
        raise HidropError(
            f"cannot write {path} as a picture: {error}; use a name in .png"
        ) from error
