"""The first call for a prompt: lay the batch out, fill the cache, choose the vision tokens.

states = prefill(runtime, inputs, cache, labels=None, rows="last", draft=0)
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hidrop_fx.lowering.executable import Executable
from hidrop_fx.pipeline.pipeline import Output, Variant
from hidrop_fx.planning.geometry import vision_tokens_per_image
from hidrop_fx.planning.layout import Layout
from hidrop_fx.program.program import Kind
from hidrop_fx.runtime import vision
from hidrop_fx.runtime.captures import Capture
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import DecoderOutput, Rows
from hidrop_fx.runtime.prompt import (
    Prompt,
    Rounding,
    feature_places,
    lay_out_prompt,
    read_prompt,
    text_embeddings,
)

if TYPE_CHECKING:
    from hidrop_fx.runtime.runtime import Runtime


def prefill(
    runtime: "Runtime",
    inputs: dict[str, Any],
    cache: HidropCache | None,
    labels: Tensor | None,
    rows: Rows,
    draft: int,
) -> DecoderOutput:
    """Run a prompt; the cache, if there is one, is filled."""
    capture = runtime.capture()
    kind: Kind = "train" if cache is None else "prefill"
    wanted = runtime.wants(inputs, "output_hidden_states")
    graphs = _graphs(runtime, draft, wanted)
    prompt = read_prompt(runtime, inputs, labels, draft)
    overlap = _overlap_lengths(runtime, inputs, kind)
    images = vision.encode(runtime, inputs) if overlap is None else []
    lengths = [len(image) for image in images] if overlap is None else overlap
    rounding = Rounding() if graphs is None else _rounding(runtime, lengths, kind)
    if graphs is not None:
        prompt = prompt.padded(rounding)
    layout = lay_out_prompt(runtime, prompt, lengths, rounding)
    if overlap is not None and layout.needs_features:
        images, overlap = vision.encode(runtime, inputs), None
    runtime.last_layout = layout
    runtime.last_cache_bytes = None

    device = runtime.decoder.get_input_embeddings().weight.device
    tensors = {name: t.to(device) for name, t in layout.inputs.items()}
    text = text_embeddings(runtime, prompt, tensors["text_columns"])
    features = vision.joined(images)
    if overlap is not None:
        places = feature_places(prompt, device)
        tensors["feature_places"] = places.gather(1, tensors["vision_columns"])
        tensors |= {"text_embeds": text, "pixel_values": vision.pixels(runtime, inputs)}
    else:
        tensors |= _embeddings(prompt, layout, text, features, tensors)
    masks = _masks_needed(capture, layout.columns)
    tensors |= _mask_tables(capture, masks, layout, device)
    output: Output = "all" if rows == "all" or wanted else "chosen"
    variant = Variant(output=output, masks=masks, states=wanted, overlap=overlap is not None)
    run = runtime.executable(capture, kind, variant)
    if rows == "text":
        tensors["output_columns"] = tensors["text_columns"]
    if kind == "train":
        tensors |= _ratio_inputs(runtime)
    buffers: dict[str, Tensor] = {}
    if cache is not None:
        buffers = _allocate(cache, capture, run, layout, prompt, text, rounding)
        graphs = None if cache.pool is None else graphs
    outputs = _run(runtime, run, kind, tensors | buffers, buffers, graphs)
    if cache is not None:
        cache.note_columns(_columns(outputs), layout.columns)
        runtime.last_cache_bytes = cache.nbytes

    hidden, hidden_states = outputs["hidden"], None
    if output == "all":
        full = scatter_rows(
            hidden, _columns(outputs)[run.program.segments[-1].name], layout.columns
        )
        hidden = _chosen_rows(full, tensors, rows)[:, : prompt.length]
        if wanted:
            states = (*_between_layers(run, outputs, layout), full)
            hidden_states = tuple(state[:, : prompt.length] for state in states)
    return DecoderOutput(
        hidden=hidden,
        columns=tensors["text_columns"] if rows == "text" else None,
        cache=cache,
        features=outputs.get("features", features),
        hidden_states=hidden_states,
        extras={name: outputs[name] for name in run.program.extras},
    )


def _graphs(runtime: "Runtime", draft: int, wants_states: bool) -> GraphRunner | None:
    if runtime.graphs is None or not (draft or wants_states):
        return runtime.graphs
    what = "output_hidden_states" if wants_states else "a prompt with a draft behind it"
    runtime.once(f"{what}: these prompts run without a graph")
    return None


def _overlap_lengths(runtime: "Runtime", inputs: dict[str, Any], kind: Kind) -> list[int] | None:
    """Tokens of each image where the vision tower runs beside the text-only layers."""
    if kind != "prefill" or not runtime.overlaps_vision:
        return None
    return vision.overlap_lengths(runtime, inputs)


def _rounding(runtime: "Runtime", images: list[int], kind: Kind) -> Rounding:
    """Vision tokens keep their number where all images of this model have the same.

    Not in training, where labels behind images and learned ratios change it.
    """
    multiple = runtime.options.bucket_multiple
    fixed = vision_tokens_per_image(runtime.model)
    exact = kind == "prefill" and all(tokens == fixed for tokens in images)
    return Rounding(text=multiple, vision=1 if exact else multiple)


def _embeddings(
    prompt: Prompt,
    layout: Layout,
    text: Tensor,
    features: Tensor | None,
    tensors: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What both segments begin with."""
    if features is None:
        return {"text_embeds": text, "vision_embeds": text[:, :0]}
    features = features.to(text.device, text.dtype)
    if vision.fills_rows(layout, features):
        shape = (*layout.inputs["vision_columns"].shape, text.shape[2])
        return {"text_embeds": text, "vision_embeds": features.reshape(shape)}
    places = feature_places(prompt, text.device)
    tokens = features[places.gather(1, tensors["vision_columns"])]
    if layout.needs_features:
        columns = tensors["text_columns"]
        is_image = torch.nn.functional.pad(prompt.placeholder, (0, 1)).to(text.device)
        of_image = is_image.gather(1, columns)[:, :, None]
        text = torch.where(of_image, features[places.gather(1, columns)], text)
    return {"text_embeds": text, "vision_embeds": tokens}


def _allocate(
    cache: HidropCache,
    capture: Capture,
    run: Executable,
    layout: Layout,
    prompt: Prompt,
    like: Tensor,
    rounding: Rounding,
) -> dict[str, Tensor]:
    """The cache's buffers, as inputs of the program."""
    cache.prompt_mask = prompt.mask.to(like.device)
    cache.padded_right = not bool(prompt.mask[:, -1].all())
    cache.origin = capture
    segments = [run.program.segment_of(r.layer).name for r in run.program.regions]
    return cache.allocate(
        layout, segments, capture.kv_shapes, like, prompt.length, prompt.draft, rounding.text
    )


def _columns(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns [B, S] of each segment."""
    prefix = "columns_"
    return {k.removeprefix(prefix): v for k, v in outputs.items() if k.startswith(prefix)}


def _masks_needed(capture: Capture, columns: int) -> tuple[str, ...]:
    return tuple(name for name, window in capture.windows.items() if columns > window)


def _run(
    runtime: "Runtime",
    run: Executable,
    kind: Kind,
    tensors: dict[str, Tensor],
    buffers: Collection[str],
    graphs: GraphRunner | None,
) -> dict[str, Tensor]:
    recompute = kind == "train" and _checkpoints_layers(runtime)
    if recompute and graphs is not None:
        runtime.once("gradient checkpointing is on: training runs without CUDA graphs")
    if graphs is None or recompute:
        return run(tensors, recompute=recompute)
    return graphs(run, tensors, buffers)


def _checkpoints_layers(runtime: "Runtime") -> bool:
    """Whether `gradient_checkpointing_enable()` is in force."""
    if not (runtime.model.training and torch.is_grad_enabled()):
        return False
    return any(getattr(m, "gradient_checkpointing", False) for m in runtime.decoder.modules())


def _mask_tables(
    capture: Capture, masks: tuple[str, ...], layout: Layout, device: torch.device
) -> dict[str, Tensor]:
    batch = len(layout.last)
    tables = {name: window_table(layout.columns, capture.windows[name]) for name in masks}
    return {f"column_{k}": t.expand(batch, 1, -1, -1).to(device) for k, t in tables.items()}


def _ratio_inputs(runtime: "Runtime") -> dict[str, Tensor]:
    ratios = runtime.ratios
    if ratios is None:
        return {}
    if not ratios.values.requires_grad:
        runtime.once(
            "the pruning ratios are frozen (PEFT freezes all but its own parameters); to learn them: "
            "model.hidrop_ratios.requires_grad_(True)"
        )
    return {f"ratio_{layer}": ratios[layer] for layer in ratios.layers}


def _chosen_rows(full: Tensor, tensors: dict[str, Tensor], rows: Rows) -> Tensor:
    """What a program that returns all rows [B, L, D] was not asked to leave out."""
    if rows == "all":
        return full
    columns = tensors["text_columns" if rows == "text" else "output_columns"]
    index = columns.clamp(max=full.shape[1] - 1)
    return full.gather(1, index[:, :, None].expand(-1, -1, full.shape[2]))


def _between_layers(run: Executable, outputs: dict[str, Tensor], layout: Layout) -> list[Tensor]:
    """What the first layer reads, and what all but the last give, at the columns of the prompt."""
    found = []
    for index in range(len(run.program.regions)):
        segment = run.program.segment_of(max(0, index - 1)).name
        states = outputs[f"states_{index}"]
        found.append(scatter_rows(states, outputs[f"columns_{segment}"], layout.columns))
    return found


def scatter_rows(hidden: Tensor, columns: Tensor, length: int) -> Tensor:
    """Rows [B, S, D] back at their columns -> [B, L, D], zero elsewhere."""
    full = hidden.new_zeros(len(hidden), length + 1, hidden.shape[2])
    index = columns[:, :, None].expand(-1, -1, hidden.shape[2])
    return full.scatter(1, index, hidden)[:, :length]


def window_table(length: int, window: int) -> Tensor:
    """A sliding-window mask over the columns of a prompt and the sentinel, bool [L + 1, L + 1].

    As in transformers' `sliding_window_overlay`: a query sees the `window` columns that end at its own.
    """
    columns = torch.arange(length + 1)
    distance = columns[:, None] - columns[None, :]
    return (distance >= 0) & (distance < window)
