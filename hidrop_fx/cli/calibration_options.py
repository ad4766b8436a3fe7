"""The options of `hidrop calibrate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hidrop_fx.cli.options import (
    BackendName,
    DataFile,
    DataImages,
    DataPrompts,
    Device,
    Dtype,
)


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
    data: DataFile = None
    images: DataImages = None
    prompts: DataPrompts = None
    samples: Annotated[int, typer.Option(min=1, help="How many to use, at most.")] = 64
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8
    trials: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pyramids to compare; 0 takes the first.")
    ] = 40
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help='Hold it against others inside the budget: "hidrop", a method as "fastv(layer=1)", or a reducer in '
            'front of the pyramid, "divprune+hidrop". May be given several times.',
        ),
    ] = None
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
