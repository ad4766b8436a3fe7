"""The options of `hidrop eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hidrop_fx.cli.options import (
    Attention,
    BackendName,
    DataFile,
    DataImages,
    DataPrompts,
    Device,
    Dtype,
    ModelName,
)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `hidrop eval`."""

    model: ModelName = None
    data: DataFile = None
    images: DataImages = None
    prompts: DataPrompts = None
    samples: Annotated[int, typer.Option(min=1, help="Questions, at most.")] = 240
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Of the shipped model's table, such as hidrop or fastv; vanilla is plain Hugging Face. "
            "May be given several times. Default: all.",
        ),
    ] = None
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="SHARE",
            help="Of that table, per cent of the vision tokens: 11, 8, '11 kv', '8 kv', own. May be given several times. "
            "Default: 11 and 8; all that a --method has.",
        ),
    ] = None
    schedules: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            metavar="SPEC",
            help="A schedule beside, or in the place of, that table. May be given several times.",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 24
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 8
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where answers go, and are found again.")
    ] = Path("hidrop-eval")
    device: Device = None
    dtype: Dtype = "auto"
    attn_implementation: Attention = None
    backend: BackendName = "inductor"
