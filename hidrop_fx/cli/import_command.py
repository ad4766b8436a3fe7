"""`hidrop import-llava`."""

from pathlib import Path
from typing import Annotated

import typer

from hidrop_fx.cli.application import app, check, report_progress, show
from hidrop_fx.cli.options import AsJson, OptionalSchedule

Directory = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="In LLaVA's own format.")]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Must not exist yet.")]
TowerDirectory = Annotated[
    Path | None,
    typer.Option(
        "--vision-tower",
        metavar="DIR",
        help="The CLIP model that config.json names as mm_vision_tower. Default: that, if it is a directory here.",
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="DIR",
        help="The text model that LoRA adapters, or a projector, belong to.",
    ),
]
Twig = Annotated[
    Path | None, typer.Option("--twig", metavar="DIR", help="A side branch that TwigVLM trained.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16; of the files."
    ),
]


@app.command("import-llava")
def import_command(
    checkpoint: Directory,
    output: Output,
    vision_tower: TowerDirectory = None,
    base: Base = None,
    twig: Twig = None,
    schedule: OptionalSchedule = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint of the original LLaVA as a Hugging Face directory, with its schedule beside it.

    Of LLaVA, PyramidDrop, TwigVLM and HiDrop, as their authors release them. --schedule says under which schedule a
    checkpoint was trained, where its config.json does not.

    \b
    Example: hidrop import-llava llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 --output llava
    """
    check(schedule, "eager")
    from hidrop_fx.checkpoints import import_llava

    with report_progress(as_json) as progress:
        done = import_llava(
            checkpoint,
            output=output,
            vision_tower=vision_tower,
            base=base,
            twig=twig,
            schedule=schedule,
            dtype=dtype,
            progress=progress,
        )
    show(done, as_json)
