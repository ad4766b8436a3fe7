"""`hidrop plan`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hidrop_fx.cli.application import app, print_json
from hidrop_fx.cli.options import AsJson, ScheduleText
from hidrop_fx.errors import HidropError

if TYPE_CHECKING:
    from hidrop_fx.planning import Costs
    from hidrop_fx.planning.launch_counts import LaunchCounts

LLAVA_7B: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vocab_size": 32064,
    "vision_tokens": 576,
}
"""Sizes of LLaVA-1.5-7B, with one image."""


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
    units: Annotated[
        int | None,
        typer.Option("--units", help="Tiles or frames, for a schedule with per=tile or per=frame."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens")] = 0,
    device: Annotated[
        str | None,
        typer.Option("--device", help="The least time on it as well: h100 or h200."),
    ] = None,
    launches: Annotated[
        bool,
        typer.Option(
            "--launches",
            help="With --device: count the launches of the model's programs as well, which takes half a minute.",
        ),
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", help="A training step on so many GPUs as well."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", metavar="NAME", help="ddp, fsdp (default), zero3, hsdp or tp."),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth",
            metavar="RATE",
            help='Of a GPU\'s link, bytes a second ("450e9"), or nvlink (default), nvlink3, pcie5, pcie4, 400gb, 200gb, 100gb.',
        ),
    ] = None,
    node_size: Annotated[
        int | None, typer.Option("--node-size", help="GPUs of a node. Default: 8.")
    ] = None,
    node_bandwidth: Annotated[
        str | None,
        typer.Option("--node-bandwidth", metavar="RATE", help="Between nodes, a GPU's share."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a schedule means: tokens per layer, FLOPs, KV bytes. Loads no weights.

    Sizes that are not given are those of LLaVA-1.5-7B, or of --model.

    \b
    Example: hidrop plan --schedule hidrop-64 --images 2
    Example: hidrop plan --schedule hidrop-64 --batch-size 8 --device h100
    Example: hidrop plan --schedule hidrop-64 --device h100 --launches
    Example: hidrop plan --schedule hidrop-64 --batch-size 8 --world-size 16 --node-bandwidth 400gb
    Example: hidrop plan --schedule "inject=4,exit=20" --num-layers 28 --hidden-size 3584
    """
    from hidrop_fx.cli.prompts import schedule_text
    from hidrop_fx.planning import plan as make_plan

    if launches and device is None:
        raise HidropError(
            "--launches are held against the time on a device: pass --device h100, too"
        )
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
        from hidrop_fx.cli.config_file import read_config

        config = read_config(model)
        if config is None:
            from hidrop_fx.models.loading import load_config

            config = load_config(model)
    else:
        llava = LLAVA_7B | {"vision_tokens": LLAVA_7B["vision_tokens"] * images}
        sizes |= {name: size for name, size in llava.items() if sizes[name] is None}
    made = make_plan(
        schedule_text(model, schedule) or schedule,
        config,
        text_tokens=text_tokens,
        images=images,
        units=units,
        batch_size=batch_size,
        new_tokens=new_tokens,
        world_size=world_size,
        strategy=strategy,
        bandwidth=bandwidth,
        node_size=node_size,
        node_bandwidth=node_bandwidth,
        **sizes,
    )
    roofline = None if device is None else made.on(device)
    if device is not None and launches:
        roofline = made.on(device, launches=_launches(made, model))
    if as_json:
        print_json(made.to_dict() | ({} if roofline is None else {"roofline": roofline.to_dict()}))
    else:
        typer.echo(str(made) if roofline is None else f"{made}\n\n{roofline}")


def _launches(made: "Costs", model: str | None) -> "LaunchCounts":
    """Count launches from a model's config, or from that of a LLaVA of the plan's sizes."""
    from hidrop_fx.inspection.counted_launches import count_launches
    from hidrop_fx.models.loading import load_config
    from hidrop_fx.models.weightless import llava_config

    config = llava_config(made.geometry) if model is None else load_config(model)
    return count_launches(config, made)
