"""The command line: `hidrop demo`, `hidrop run`, `hidrop plan`, `hidrop calibrate`.

    hidrop run --model llava-hf/llava-1.5-7b-hf --image cat.png --prompt "What is this?" \\
        --schedule hidrop-64

Results go to stdout, as tables or (`--json`) as one JSON object; progress and errors go to stderr.
What is wrong with the arguments is said in one line, with exit code 2.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hidrop_fx.errors import HidropError

_USAGE_ERROR = 2


class Commands(TyperGroup):
    """Turns errors that the user can mend into one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (HidropError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(_USAGE_ERROR) from error


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

ScheduleText = Annotated[
    str,
    typer.Option(
        "--schedule",
        metavar="SPEC",
        help='A preset ("hidrop-64"), a JSON file, or "inject=8,prune=10:215+14:10,exit=24".',
    ),
]
BackendName = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="inductor, aot_eager or eager.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
ModelName = Annotated[
    str, typer.Option("--model", metavar="NAME", help="A model directory or an id on the Hub.")
]


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from hidrop_fx import __version__

        typer.echo(f"hidrop-fx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Vision-language models whose vision tokens enter late, are pruned and leave early."""


@app.command()
def demo(
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", metavar="SPEC", help="Instead of the demo's own schedule."),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many to ask, at most.")] = 6,
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
    """Ask a small LLaVA about a picture, with plain Hugging Face and under a schedule.

    \b
    Example: hidrop demo --seed 4 --questions 8
    """
    from hidrop_fx.demo import MODEL_DIR, SCHEDULE_FILE
    from hidrop_fx.demo.session import demo as run_demo

    _check(schedule, backend)
    with _progress(as_json) as tell:
        session = run_demo(
            str(SCHEDULE_FILE) if schedule is None else schedule,
            output=output,
            count=questions,
            seed=seed,
            backend=backend,
            directory=MODEL_DIR if model is None else model,
            tell=tell,
        )
    if as_json:
        _print_json(session.to_dict())
    else:
        from hidrop_fx.demo.rendering import print_session, stdout_console

        print_session(session, stdout_console())


@app.command()
def run(
    model: ModelName,
    image: Annotated[
        list[Path], typer.Option("--image", metavar="FILE", help="May be given several times.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The question, without <image>.")],
    schedule: ScheduleText,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    attn_implementation: Annotated[
        str | None,
        typer.Option("--attn-implementation", metavar="NAME", help="As in transformers."),
    ] = None,
    backend: BackendName = "inductor",
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask plain Hugging Face, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a model about images under a schedule (greedy decoding).

    \b
    Example: hidrop run --model llava-hf/llava-1.5-7b-hf --image cat.png \\
                 --prompt "What is this?" --schedule hidrop-64 --compare
    """
    from hidrop_fx.api import compile as hidrop_compile
    from hidrop_fx.demo import session
    from hidrop_fx.inspection import inspect, measure

    _check(schedule, backend)
    images = [session.open_image(path) for path in image]
    with _progress(as_json) as tell:
        tell(f"loading {model}")
        loaded, processor = session.load(
            model, device=device, dtype=dtype, attention=attn_implementation
        )
        inputs = session.chat(loaded, processor, images, prompt)
        found: dict[str, Any] = {
            "model": model,
            "images": [str(p) for p in image],
            "prompt": prompt,
        }
        if compare:
            tell("asking the plain Hugging Face model")
            found["hf"] = {
                "answer": session.answer(loaded, processor, inputs, max_new_tokens),
                **measure(loaded, inputs, new_tokens=None, repeats=3).to_dict(),
            }
        hidrop_compile(loaded, schedule, backend=backend)
        session.prepare(loaded, inputs, tell, decode=max_new_tokens > 1)
        tell("answering")
        found["answer"] = session.answer(loaded, processor, inputs, max_new_tokens)
        found |= measure(loaded, inputs, new_tokens=None, repeats=3).to_dict()
        report = inspect(loaded)
    found |= {
        "schedule": report.schedule.to_dict(),
        "backend": backend,
        "tokens": [layer.tokens for layer in report.layers],
        "compile_seconds": report.compile_seconds,
        "fallbacks": list(report.fallbacks),
    }
    if as_json:
        _print_json(found)
    else:
        from hidrop_fx.demo.rendering import print_answer, stdout_console

        print_answer(found, report, stdout_console())


@app.command()
def plan(
    schedule: ScheduleText,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Take the sizes from this model's config."),
    ] = None,
    num_layers: Annotated[int | None, typer.Option("--num-layers")] = None,
    hidden_size: Annotated[int | None, typer.Option("--hidden-size")] = None,
    intermediate_size: Annotated[int | None, typer.Option("--intermediate-size")] = None,
    num_attention_heads: Annotated[int | None, typer.Option("--num-attention-heads")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option("--num-key-value-heads")] = None,
    head_dim: Annotated[int | None, typer.Option("--head-dim")] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size")] = None,
    dtype_bytes: Annotated[int | None, typer.Option("--dtype-bytes")] = None,
    vision_tokens: Annotated[
        int | None, typer.Option("--vision-tokens", help="Of all images together.")
    ] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens")] = 64,
    images: Annotated[int, typer.Option("--images")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a schedule means: tokens per layer, FLOPs, KV bytes. Loads no weights.

    Sizes that are not given are those of LLaVA-1.5-7B, or of --model.

    \b
    Example: hidrop plan --schedule hidrop-64 --images 2
    Example: hidrop plan --schedule "inject=4,exit=20" --num-layers 28 --hidden-size 3584
    """
    from hidrop_fx.planning import plan as make_plan

    sizes: dict[str, int | None] = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "dtype_bytes": dtype_bytes,
        "vision_tokens": vision_tokens,
    }
    config = None
    if model is not None:
        from hidrop_fx.demo.session import load_config

        config = load_config(model)
    else:
        llava = {
            "num_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "vocab_size": 32064,
            "vision_tokens": 576 * images,
        }
        sizes |= {name: size for name, size in llava.items() if sizes[name] is None}
    made = make_plan(
        schedule,
        config,
        text_tokens=text_tokens,
        images=images,
        batch_size=batch_size,
        new_tokens=new_tokens,
        **sizes,
    )
    if as_json:
        _print_json(made.to_dict())
    else:
        typer.echo(str(made))


@app.command()
def calibrate(
    budget: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help='"64" (vision tokens a layer), "flops=0.25", "kv=0.25" or "latency=0.05" (seconds).',
        ),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the small model shipped here.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A LLaVA-format JSON file, or a folder of images."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images of a JSON file are.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Of a folder: a question a line, or "image<TAB>question". Default: prompts.txt in it.',
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many to use, at most.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    trials: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pyramids to compare; 0 takes the first.")
    ] = 40,
    refine: Annotated[
        int, typer.Option(min=0, metavar="N", help="Schedules to try in a local search.")
    ] = 0,
    answers: Annotated[
        bool | None,
        typer.Option(
            "--answers/--no-answers",
            help="Measure accuracy on the data's answers, or divergence from the full model. "
            "Default: accuracy where all answers are short.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(help="Damage that inject and exit may do, as a share of the worst."),
    ] = 0.02,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write it.")] = Path(
        "hidrop-calibration"
    ),
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")
    ] = "auto",
    backend: BackendName = "eager",
    seed: Annotated[int, typer.Option(min=0, help="Of the local search.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find a schedule for a model from data; every other command takes the file it writes.

    \b
    Example: hidrop calibrate --budget 16 --refine 50
    Example: hidrop calibrate --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json \\
                 --images images --samples 128 --budget 64
    """
    from hidrop_fx.analysis.command import calibrate_files, report

    _check(None, backend)
    with _progress(as_json) as tell:
        done = calibrate_files(
            model=model,
            data=data,
            images=images,
            prompts=prompts,
            budget=budget,
            samples=samples,
            batch_size=batch_size,
            trials=trials,
            refine=refine,
            answers=answers,
            tolerance=tolerance,
            output=output,
            device=device,
            dtype=dtype,
            backend=backend,
            seed=seed,
            progress=False,
            tell=tell,
        )
    if as_json:
        _print_json(report(done))
    else:
        typer.echo(done.calibration.table())
        typer.echo(f"\nschedule  {done.schedule}\nwritten   {', '.join(map(str, done.files))}")


def _check(schedule: str | None, backend: str) -> None:
    """Say what is wrong with them before a model is loaded."""
    from hidrop_fx.lowering import BACKENDS
    from hidrop_fx.schedule import Schedule

    if schedule is not None:
        Schedule.parse(schedule)
    if backend not in BACKENDS:
        raise HidropError(f"backend={backend!r}; use one of {', '.join(BACKENDS)}")


def _progress(as_json: bool) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from hidrop_fx.inspection.progress import Progress

    # The bars of transformers would tear the status line.
    disable_progress_bar()
    return Progress(lines=not as_json)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))
