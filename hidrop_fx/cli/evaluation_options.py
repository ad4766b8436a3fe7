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

SAMPLES, BATCH_SIZE, NEW_TOKENS = 240, 24, 8
"""Of questions that are not lmms-eval's, where an option does not say it."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `hidrop eval`."""

    model: ModelName = None
    data: DataFile = None
    images: DataImages = None
    prompts: DataPrompts = None
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks of lmms-eval, which it runs under each --schedule in the place of the questions here.",
        ),
    ] = None
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path", metavar="DIR", help="Of --tasks that lmms-eval does not ship."
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions, at most. Default: 240; of --tasks all.", show_default=False
        ),
    ] = None
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
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Default: 24; of --tasks 8.")
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Default: 8; of --tasks what they say."),
    ] = None
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where answers go, and are found again.")
    ] = Path("hidrop-eval")
    device: Device = None
    dtype: Dtype = "auto"
    attn_implementation: Attention = None
    backend: BackendName = "inductor"
