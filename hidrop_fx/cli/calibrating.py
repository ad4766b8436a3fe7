"""`hidrop calibrate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hidrop_fx.cli.application import app, check, print_json, progress
from hidrop_fx.cli.options import AsJson, BackendName, Device, Dtype, spelled_out


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The options of `hidrop calibrate`."""

    budget: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help='"64" (vision tokens a layer), "flops=0.25", "kv=0.25" or "latency=0.05" (seconds).',
        ),
    ]
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the small model shipped here.")
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A LLaVA-format JSON file, or a folder of images."),
    ] = None
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images of a JSON file are.")
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Of a folder: a question a line, or "image<TAB>question". Default: prompts.txt in it.',
        ),
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="How many to use, at most.")] = 64
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8
    trials: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pyramids to compare; 0 takes the first.")
    ] = 40
    refine: Annotated[
        int, typer.Option(min=0, metavar="N", help="Schedules to try in a local search.")
    ] = 0
    answers: Annotated[
        bool | None,
        typer.Option(
            "--answers/--no-answers",
            help="Measure accuracy on the data's answers, or divergence from the full model. "
            "Default: accuracy where all answers are short.",
        ),
    ] = None
    tolerance: Annotated[
        float,
        typer.Option(help="Damage that inject and exit may do, as a share of the worst."),
    ] = 0.02
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write it.")] = Path(
        "hidrop-calibration"
    )
    device: Device = None
    dtype: Dtype = "auto"
    backend: BackendName = "eager"
    seed: Annotated[int, typer.Option(min=0, help="Of the local search.")] = 0


@app.command()
@spelled_out
def calibrate(options: CalibrationOptions, as_json: AsJson = False) -> None:
    """Find a schedule for a model from data; every other command takes the file it writes.

    \b
    Example: hidrop calibrate --budget 16 --refine 50
    Example: hidrop calibrate --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json \\
                 --images images --samples 128 --budget 64
    """
    from hidrop_fx.cli.calibration_files import calibrate_files, report

    check(None, options.backend)
    with progress(as_json) as tell:
        done = calibrate_files(options, tell)
    if as_json:
        print_json(report(done))
    else:
        typer.echo(done.calibration.table())
        typer.echo(f"\nschedule  {done.schedule}\nwritten   {', '.join(map(str, done.files))}")
