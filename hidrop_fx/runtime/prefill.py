"""The first call for a prompt: lay the batch out, fill the cache, choose the vision tokens.

states = prefill(runtime, inputs, cache, labels=None, rows="last", draft=0)
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hidrop_fx.errors import InputError
from hidrop_fx.layout import IGNORE, Layout, count_images, lay_out
from hidrop_fx.lowering import Executable
from hidrop_fx.pipeline import Output
from hidrop_fx.program import Kind
from hidrop_fx.runtime.cache import HidropCache
from hidrop_fx.runtime.captures import Capture
from hidrop_fx.runtime.states import Rows, States

if TYPE_CHECKING:
    from hidrop_fx.runtime.runtime import Runtime


def prefill(
    runtime: "Runtime",
    inputs: dict[str, Any],
    cache: HidropCache | None,
    labels: Tensor | None,
    rows: Rows,
    draft: int,
) -> States:
    """Run a prompt; the cache, if there is one, is filled."""
    capture = runtime.capture()
    kind: Kind = "train" if cache is None else "prefill"
    length = _length(inputs)
    if kind == "train" and runtime.graphs is not None:
        inputs, labels = rounded_up(inputs, labels, runtime.options.bucket_multiple)
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    placeholder = _placeholders(runtime, ids, embeds)
    images = _features(runtime, inputs)
    placeholder[:, placeholder.shape[1] - draft :] = False  # a draft may repeat one, as a word
    layout = _lay_out(runtime, inputs, placeholder, images, labels, draft)
    runtime.last_layout = layout
    runtime.last_cache_bytes = None
    device = runtime.decoder.get_input_embeddings().weight.device
    tensors = {name: t.to(device) for name, t in layout.inputs.items()}
    features = _joined(images)
    tensors |= _embeddings(runtime, ids, embeds, features, placeholder, layout, tensors)

    masks = _masks_needed(capture, layout.columns)
    tensors |= _mask_tables(capture, masks, layout, device)
    wanted = runtime.wants(inputs, "output_hidden_states")
    output: Output = "all" if rows == "all" or wanted else "chosen"
    run = runtime.executable(capture, kind, output, masks, states=wanted)
    if rows == "text":
        tensors["output_columns"] = tensors["text_columns"]
    if kind == "train":
        tensors |= _ratio_inputs(runtime)
    if cache is not None:
        mask = _valid(inputs.get("attention_mask"), placeholder).to(device)
        cache.prompt_mask = mask[:, : layout.columns - draft]
        tensors |= _buffers(cache, capture, run, layout, tensors["text_embeds"], draft)
    outputs = _run(runtime, run, kind, tensors)
    if cache is not None:
        cache.note_columns(
            {k.removeprefix("columns_"): v for k, v in outputs.items() if k.startswith("columns_")}
        )
        runtime.last_cache_bytes = cache.nbytes

    hidden, hidden_states = outputs["hidden"], None
    if output == "all":
        last_stream = run.program.streams[-1].name
        full = scatter_rows(hidden, outputs[f"columns_{last_stream}"], layout.columns)
        hidden = _chosen_rows(full, tensors, rows)[:, :length]
        if wanted:
            states = (*_between_layers(run, outputs, layout), full)
            hidden_states = tuple(state[:, :length] for state in states)
    return States(
        hidden=hidden,
        columns=tensors["text_columns"] if rows == "text" else None,
        cache=cache,
        features=features,
        hidden_states=hidden_states,
    )


def _placeholders(runtime: "Runtime", ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    token = runtime.family.placeholder(runtime.model.config)
    if ids is not None:
        return (ids == token).cpu()
    embedding = runtime.decoder.get_input_embeddings()
    vector = embedding(torch.tensor(token, device=embedding.weight.device))
    assert embeds is not None
    return (embeds == vector).all(dim=-1).cpu()


def _features(runtime: "Runtime", inputs: dict[str, Any]) -> list[Tensor]:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        if inputs.get("pixel_values") is not None:
            raise InputError("pass either pixel_values or mm_encoder_outputs, not both")
        return list(encoded.pooler_output)
    if inputs.get("pixel_values") is None:
        return []
    return runtime.family.encode_images(runtime.base, inputs)


def _lay_out(
    runtime: "Runtime",
    inputs: dict[str, Any],
    placeholder: Tensor,
    images: list[Tensor],
    labels: Tensor | None,
    draft: int,
) -> Layout:
    if not images and placeholder.any():
        row = int(placeholder.any(dim=1).nonzero()[0])
        raise InputError(
            f"row {row} has {int(placeholder[row].sum())} image placeholder tokens but the call "
            "has no images; pass pixel_values (the processor makes them from images=...)"
        )
    counts = count_images(placeholder, [len(image) for image in images])
    ids = inputs.get("position_ids")
    mask = inputs.get("attention_mask")
    if ids is None:
        ids = torch.arange(placeholder.shape[1])[None]
    elif mask is None and inputs.get("past_key_values") is None and _is_packed(ids):
        raise InputError(
            "position_ids start anew within a row and there is no attention_mask: these are "
            "packed sequences, which a compiled model cannot keep apart; pad them instead"
        )
    ids = ids.cpu().expand(placeholder.shape)
    valid = _valid(mask, placeholder)
    if labels is not None and labels.shape != placeholder.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, input_ids {tuple(placeholder.shape)}"
        )
    if labels is not None and bool(((labels.cpu() != IGNORE) & ~valid).any()):
        raise InputError(
            f"labels supervise padding; set them to {IGNORE} where attention_mask is 0"
        )
    return lay_out(
        runtime.schedule,
        runtime.plan.geometry.num_layers,
        valid=valid,
        placeholder=placeholder,
        position_ids=ids,
        images=counts,
        labels=None if labels is None else labels.cpu(),
        ratios=None if runtime.ratios is None else runtime.ratios.numbers(),
        draft=draft,
        multiple=1 if runtime.graphs is None else runtime.options.bucket_multiple,
    )


def _embeddings(
    runtime: "Runtime",
    ids: Tensor | None,
    embeds: Tensor | None,
    features: Tensor | None,
    placeholder: Tensor,
    layout: Layout,
    tensors: dict[str, Tensor],
) -> dict[str, Tensor]:
    embedding = runtime.decoder.get_input_embeddings()
    columns = tensors["text_columns"]
    if embeds is None:
        assert ids is not None
        padded = nn.functional.pad(ids, (0, 1))
        text = embedding(padded.to(columns.device).gather(1, columns))
    else:
        padded = nn.functional.pad(embeds, (0, 0, 0, 1))
        text = padded.gather(1, columns[:, :, None].expand(-1, -1, embeds.shape[2]))
    if features is None:
        return {"text_embeds": text, "vision_embeds": text[:, :0]}
    features = features.to(text.device, text.dtype)
    if _fills_rows(layout, features):
        shape = (*layout.inputs["vision_columns"].shape, text.shape[2])
        return {"text_embeds": text, "vision_embeds": features.reshape(shape)}
    # Features come in the order of their places, row after row; the sentinel takes any.
    order = placeholder.flatten().cumsum(0).sub(1).clamp(min=0).view_as(placeholder)
    order = nn.functional.pad(order, (0, 1)).to(text.device)
    vision = features[order.gather(1, tensors["vision_columns"])]
    if layout.needs_features:
        places = nn.functional.pad(placeholder, (0, 1)).to(text.device).gather(1, columns)
        text = torch.where(places[:, :, None], features[order.gather(1, columns)], text)
    return {"text_embeds": text, "vision_embeds": vision}


def _length(inputs: dict[str, Any]) -> int:
    given = inputs.get("input_ids")
    return int((inputs["inputs_embeds"] if given is None else given).shape[1])


def rounded_up(
    inputs: dict[str, Any], labels: Tensor | None, multiple: int
) -> tuple[dict[str, Any], Tensor | None]:
    """Inputs padded on the right to a multiple of so many columns, for shapes that come again."""
    length = _length(inputs)
    extra = -length % multiple
    if extra == 0:
        return inputs, labels
    padded = dict(inputs)
    name = "inputs_embeds" if inputs.get("input_ids") is None else "input_ids"
    given: Tensor = inputs[name]
    # A pad counts from the last dimension, of which embeddings have one more.
    padded[name] = nn.functional.pad(given, (0, 0) * (given.dim() - 2) + (0, extra))
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    padded["attention_mask"] = nn.functional.pad(mask, (0, extra))
    if inputs.get("position_ids") is not None:
        padded["position_ids"] = nn.functional.pad(inputs["position_ids"], (0, extra))
    if labels is not None:
        labels = nn.functional.pad(labels, (0, extra), value=IGNORE)
    return padded, labels


def _joined(images: list[Tensor]) -> Tensor | None:
    if len(images) < 2:
        return images[0] if images else None
    return torch.cat(images)


def _fills_rows(layout: Layout, features: Tensor) -> bool:
    """Whether they are the vision stream as they come: rows equally long, none a text token's."""
    columns = layout.inputs["vision_columns"]
    return columns.numel() == len(features) and bool((columns < layout.columns).all())


def _masks_needed(capture: Capture, columns: int) -> tuple[str, ...]:
    return tuple(name for name, window in capture.windows.items() if columns > window)


def _run(
    runtime: "Runtime", run: Executable, kind: Kind, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    if kind != "train":
        return run(tensors)
    recompute = _checkpoints_layers(runtime)
    if runtime.graphs is None:
        return run(tensors, recompute=recompute)
    if recompute:
        runtime.once("gradient checkpointing is on: training runs without CUDA graphs")
        return run(tensors, recompute=True)
    return runtime.graphs(run, {name: tensors[name] for name in run.inputs})


def _checkpoints_layers(runtime: "Runtime") -> bool:
    """Whether `gradient_checkpointing_enable()` is in force."""
    if not (runtime.model.training and torch.is_grad_enabled()):
        return False
    return any(getattr(m, "gradient_checkpointing", False) for m in runtime.decoder.modules())


def _is_packed(position_ids: Tensor) -> bool:
    return bool((position_ids.diff(dim=-1) != 1).any())


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


def _buffers(
    cache: HidropCache,
    capture: Capture,
    run: Executable,
    layout: Layout,
    like: Tensor,
    draft: int,
) -> dict[str, Tensor]:
    cache.origin = capture
    streams = [run.program.stream_of(r.layer).name for r in run.program.regions]
    return cache.allocate(layout, streams, capture.kv_shapes, like, draft)


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
        stream = run.program.stream_of(max(0, index - 1)).name
        states = outputs[f"states_{index}"]
        found.append(scatter_rows(states, outputs[f"columns_{stream}"], layout.columns))
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


def _valid(attention_mask: Tensor | None, placeholder: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(placeholder)
    if attention_mask.shape != placeholder.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a compiled model takes the "
            f"2-D mask of its input_ids, {tuple(placeholder.shape)}, true or 1 for real tokens"
        )
    return attention_mask.cpu().bool()
