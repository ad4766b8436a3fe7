"""The first call for a prompt: lay the batch out, choose its program, fill the program's inputs.

context = prompt_context(scheduled, inputs, labels, rules=capture.rules, kind="prefill")
prepared = prepare_prompt(context, programs, capture, cache)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.distributed.dependence import depending
from hidrop_fx.errors import InputError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.models.encoding import Encoded, encode, for_copies, joined, once
from hidrop_fx.models.rope_parts import rope_parts
from hidrop_fx.ops.masks import MaskRule
from hidrop_fx.ops.tokens import take_rows
from hidrop_fx.planning.batch_layout import Layout, count_images
from hidrop_fx.planning.geometry import vision_tokens_per_image
from hidrop_fx.program.inputs import KVBuffers
from hidrop_fx.program.variant import Kind, Output, Variant
from hidrop_fx.runtime import vision
from hidrop_fx.runtime.before_tower import foreground
from hidrop_fx.runtime.call_context import PromptContext, filled
from hidrop_fx.runtime.captures import Capture
from hidrop_fx.runtime.every_rank import features_of_every_rank
from hidrop_fx.runtime.idle_schedule import note_idle_schedule
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import Rows
from hidrop_fx.runtime.packing import packing_of, token_arguments
from hidrop_fx.runtime.prepared_call import PreparedCall
from hidrop_fx.runtime.programs import Programs
from hidrop_fx.runtime.prompt import (
    Prompt,
    Rounding,
    check_inputs,
    feature_places,
    lay_out_prompt,
    read_prompt,
    text_embeddings,
)
from hidrop_fx.runtime.reduction import reduced, watched_tower
from hidrop_fx.runtime.room import with_room
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.runtime.transfer import to_device
from hidrop_fx.training.ratios import Ratios


def prompt_context(
    scheduled: ScheduledModel,
    inputs: dict[str, Any],
    labels: Tensor | None,
    *,
    rules: Mapping[str, MaskRule],
    kind: Kind,
    rows: Rows = "all",
    draft: int = 0,
    multiple: int | None = None,
    overlap: bool = False,
    copies: int = 1,
    together: bool = False,
) -> PromptContext:
    """Check a prompt, lay it out, encode its images and embed its text; no program is needed.

    Args:
        rules: the rule of each captured mask.
        rows: columns whose hidden states are wanted.
        draft: tokens behind the prompt that an assistant proposed.
        multiple: lengths are rounded up to a multiple of so many tokens, for graphs that serve
            several; None leaves them as they are.
        overlap: the vision tower may run beside the decoder.
        copies: of each row and, one by one, of each image that generate made before it encoded any.
        together: other processes gather the same parameters, or reduce the same gradients, and run the same modules in the same
            order.

    Raises:
        InputError: the inputs do not go together.
    """
    check_inputs(scheduled, inputs)
    states = scheduled.requests(inputs, "output_hidden_states")
    if multiple is not None and (draft or states):
        what = "output_hidden_states" if states else "a prompt with a draft behind it"
        scheduled.log_once(f"{what}: these prompts run without a graph")
        multiple = None
    packing = packing_of(scheduled, inputs, cached=kind == "prefill")
    if packing is not None:
        inputs, labels = packing.apart(inputs, labels, token_arguments(scheduled, inputs))
    prompt = read_prompt(scheduled, inputs, labels, draft, packing)
    # A deepstack's tower has more to hand on, and repeated rows are encoded once.
    overlap = overlap and scheduled.family.deepstack is None and copies == 1
    reduction = scheduled.schedule.reduction
    if reduction is not None and overlap:
        overlap = False
        scheduled.log_once(
            f"before={reduction} chooses by features: the vision tower runs before the decoder, not beside it"
        )
    known = vision.overlap_lengths(scheduled.model, inputs) if overlap else None
    if known is not None and vision.trains(scheduled, inputs):
        known = None
        scheduled.log_once(
            "gradients of the vision tower, the projector or the pixels: the tower runs before the decoder, "
            "not beside it; torch.no_grad() leaves the gradients out"
        )
    if scheduled.schedule.decides_by_pixels and not scheduled.dry_run:
        prompt, family = foreground(scheduled, prompt, inputs, copies)
        everything = encoded = _encoded(replace(scheduled, family=family), prompt, inputs, copies)
    else:
        with watched_tower(scheduled) as tower:
            encoded = _encoded(scheduled, prompt, inputs, copies) if known is None else Encoded()
        everything = encoded
        if reduction is not None:
            prompt, encoded = reduced(scheduled, prompt, encoded, tower, copies)
    of_all: list[Tensor] = []
    if together:  # a process without images runs the tower where the others do
        ids = prompt.ids if prompt.embeds is None else prompt.embeds
        assert ids is not None
        of_all = features_of_every_rank(scheduled, everything, prompt, ids.device)
    lengths = encoded.lengths if known is None else (known,)
    rounding = Rounding()
    if multiple is not None:
        rounding = _rounding(scheduled.model, lengths, kind, multiple)
        prompt = prompt.padded(rounding)
    prompt = with_room(scheduled, prompt, lengths, rounding)
    layout = lay_out_prompt(scheduled, prompt, lengths, rounding)
    if known is not None and layout.needs_features:
        encoded = everything = encode(scheduled.family, scheduled.base, inputs)
        known = None
    note_idle_schedule(scheduled, prompt, layout, inputs)
    given = prompt.embeds
    if given is None:  # a sharded table may lie on the host between the calls that gather it
        given = prompt.ids if together else scheduled.embedding.weight
    assert given is not None
    device = given.device
    text_columns, vision_columns = to_device([layout.text_columns, layout.vision_columns], device)
    columns = text_columns, vision_columns
    text = text_embeddings(scheduled, prompt, columns[0], encoded.outputs)
    vision_embeds = places = None
    features = joined(encoded.features)
    text = depending(text, of_all)
    added = _additions(scheduled, encoded, text)
    if known is None:
        known_embeds = None
        if scheduled.family.adds_features and (features is not None or together):
            known_embeds = text_embeddings(scheduled, prompt, columns[1], {})
        text, vision_embeds = _embeddings(prompt, layout, text, columns, features, known_embeds)
    else:
        places = feature_places(prompt, device).gather(1, columns[1])
    axes, ids_a_token = scheduled.family.axes, scheduled.schedule.position_copies
    return PromptContext(
        kind=kind,
        rows=rows,
        states=states,
        prompt=prompt,
        layout=layout,
        rounding=rounding,
        rounded=multiple is not None,
        rules=rules,
        device=device,
        kwargs=inputs,
        packing=packing,
        text_columns=columns[0],
        vision_columns=columns[1],
        text_embeds=text,
        vision_embeds=vision_embeds,
        added=added,
        column_features=feature_places(prompt, device) if added else None,
        features=features if everything is encoded else joined(everything.features),
        feature_lengths=tuple(map(sum, everything.lengths if known is None else lengths)),
        pixel_values=None if known is None else vision.pixels(scheduled.base, inputs),
        feature_places=places,
        kinds=tuple(kind.name for kind in scheduled.family.modalities),
        rope_parts=None if ids_a_token == 1 else rope_parts(scheduled.decoder, axes, ids_a_token),
        ratios=_learning(scheduled, kind) if torch.is_grad_enabled() or kind == "train" else None,
    )


def _encoded(
    scheduled: ScheduledModel, prompt: Prompt, inputs: dict[str, Any], copies: int
) -> Encoded:
    if copies == 1:
        return encode(scheduled.family, scheduled.base, inputs)
    encoded = encode(scheduled.family, scheduled.base, once(inputs, copies))
    kinds = zip(scheduled.family.modalities, prompt.kinds, encoded.lengths, strict=True)
    counts = [count_images(places[::copies], tokens, kind.name) for kind, places, tokens in kinds]
    return for_copies(encoded, counts, copies)


def prepare_prompt(
    context: PromptContext,
    programs: Programs,
    capture: Capture,
    cache: HidropCache | None = None,
    *,
    recompute: bool = False,
) -> PreparedCall:
    """Choose the program of a prompt and fill its inputs; the cache gets buffers for the prompt.

    Args:
        recompute: layers compute their activations again in backward.
    """
    every_row = context.rows == "all" or context.states or "head" in programs.disabled
    output: Output = "all" if every_row else "chosen"
    differentiable = torch.is_grad_enabled() and (
        context.differentiable or programs.trains(capture)
    )
    variant = Variant(
        output=output,
        masks=context.masks,
        states=context.states,
        placeholders=context.layout.needs_features and capture.decoder.deepstack is not None,
        overlap=context.pixel_values is not None,
        differentiable=differentiable and context.kind == "prefill",
    )
    executable = programs.executable(capture, context.kind, variant)
    if cache is not None:
        buffers = _allocate(cache, capture, executable, context)
        context = replace(context, buffers=buffers)
    return PreparedCall(
        kind=context.kind,
        variant=variant,
        executable=executable,
        context=context,
        tensors=filled(executable.specs, context, context.device),
        cache=cache,
        recorded=context.rounded and not recompute and (cache is None or cache.pool is not None),
        recompute=recompute,
    )


def _embeddings(
    prompt: Prompt,
    layout: Layout,
    text: Tensor,
    columns: tuple[Tensor, Tensor],
    features: Tensor | None,
    known: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return what the text stream [B, T, D] and the vision stream [B, V, D] begin with.

    Args:
        text: embeddings of the text stream, image features aside.
        columns: of the text and the vision stream, on the device.
        features: of all images, [tokens, D].
        known: embeddings [B, V, D] that features are added to, where they do not take their place.
    """
    if features is None:
        return text, text[:, :0]
    of_text, of_vision = columns
    features = features.to(text.device, text.dtype)
    if features.shape[1] != text.shape[2]:
        raise InputError(
            f"image features are {features.shape[1]} wide, the text model's embeddings {text.shape[2]}; "
            "mm_encoder_outputs must hold what get_image_features returns"
        )
    one_kind = len(prompt.kinds) == 1 or sum(bool(k.any()) for k in prompt.kinds) == 1
    if one_kind and vision.fills_rows(layout, features):
        tokens = features.reshape(*of_vision.shape, text.shape[2])
        return text, tokens if known is None else known + tokens
    places = feature_places(prompt, text.device)
    tokens = take_rows(features, places.gather(1, of_vision))
    if known is not None:
        tokens = known + tokens
    if layout.needs_features:
        is_image = torch.nn.functional.pad(prompt.placeholder, (0, 1)).to(text.device)
        of_image = is_image.gather(1, of_text)[:, :, None]
        own = take_rows(features, places.gather(1, of_text))
        text = torch.where(of_image, own if known is None else text + own, text)
    return text, tokens


def _additions(scheduled: ScheduledModel, encoded: Encoded, text: Tensor) -> dict[int, Tensor]:
    """Return the features [tokens, D] that the decoder adds at the inputs of layers, by layer."""
    deepstack = scheduled.family.deepstack
    if deepstack is None or not encoded.additions:
        return {}
    layers = deepstack.places(scheduled.model.config).layers
    rows = [joined(entries) for entries in encoded.additions]
    found = zip(layers, rows, strict=True)
    return {k: r.to(text.device, text.dtype) for k, r in found if r is not None}


def _allocate(
    cache: HidropCache, capture: Capture, executable: Executable, context: PromptContext
) -> KVBuffers:
    """Give the cache buffers for a prompt, and return the parts to be filled."""
    prompt, program = context.prompt, executable.program
    cache.origin, cache.plan = capture, program.plan
    buffers = cache.allocate(
        context.layout,
        [program.plan.layers[layer].cache for layer in capture.owners],
        capture.kv_shapes,
        like=context.text_embeds,
        room=cache.room(prompt.length, context.rounding.text),
        devices=None if (homes := capture.devices) is None else [homes[k] for k in capture.owners],
    )
    cache.log.begin(
        context.layout,
        prompt.mask,
        prompt.kinds,
        length=prompt.length,
        draft=prompt.draft,
        device=context.device,
    )
    return buffers


def _rounding(model: Any, lengths: Sequence[Sequence[int]], kind: Kind, multiple: int) -> Rounding:
    """Leave the number of vision tokens as it is where all images of this model have the same.

    Not in training, where labels behind images and learned ratios change it.
    """
    fixed = vision_tokens_per_image(model)
    exact = kind == "prefill" and all(tokens == fixed for entries in lengths for tokens in entries)
    return Rounding(text=multiple, vision=1 if exact else multiple)


def _learning(scheduled: ScheduledModel, kind: Kind) -> Ratios | None:
    ratios = scheduled.ratios
    if ratios is not None and kind == "train" and not ratios.values.requires_grad:
        scheduled.log_once(
            "the pruning ratios are frozen (PEFT freezes all but its own parameters); to learn them: "
            "model.hidrop_ratios.requires_grad_(True)"
        )
    return ratios
