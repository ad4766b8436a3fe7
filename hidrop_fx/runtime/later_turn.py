"""A prompt with images behind what a cache holds: its tokens follow the schedule, those that are there stay as they were chosen.

prepared = prepare_turn(scheduled, programs, inputs, cache, labels, rows, draft)

What each layer keeps of the turn goes behind what its cache holds; afterwards the cache is that of one longer prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.methods.scoring import reads_attention, scores_alone
from hidrop_fx.models.encoding import KnownFeatures, encode
from hidrop_fx.models.without_attention import recurrent_layers
from hidrop_fx.program.inputs import Past
from hidrop_fx.program.variant import Output, Variant
from hidrop_fx.runtime.call_context import PromptContext, filled
from hidrop_fx.runtime.decode import TURN, check_cache, follow_model, past_and_new
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import Rows
from hidrop_fx.runtime.packing import check_unpacked
from hidrop_fx.runtime.prefill import prompt_context
from hidrop_fx.runtime.prepared_call import PreparedCall
from hidrop_fx.runtime.programs import Programs
from hidrop_fx.runtime.scheduled_model import ScheduledModel
from hidrop_fx.schedule.schedule import Schedule


def prepare_turn(
    scheduled: ScheduledModel,
    programs: Programs,
    inputs: dict[str, Any],
    cache: HidropCache,
    labels: Tensor | None,
    rows: Rows,
    draft: int,
) -> PreparedCall:
    """Lay a later turn out, make room for what each layer keeps of it, and fill its program's inputs.

    Args:
        inputs: tokens of the turn alone, [B, L], its images or those of all turns, and a mask of the past and the
            turn, if any.

    Raises:
        InputError: the schedule, the model or the call has what a later turn's images do not go with.
    """
    given = inputs.get("input_ids")
    given = inputs.get("inputs_embeds") if given is None else given
    assert given is not None
    batch, length = given.shape[:2]
    check_unpacked(inputs)
    check_cache(programs, cache, batch)
    differentiable = torch.is_grad_enabled() and programs.trains(cache.origin)
    for found in _obstacles(scheduled, cache, length, draft, differentiable):
        raise _refusal(found)
    told = inputs if scheduled.family.axes == 1 else inputs | {"position_ids": None}
    real = past_and_new(scheduled, told, cache, length)
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=given.device)
    real = real.cpu()
    own = {k: v for k, v in inputs.items() if k != "past_key_values"}
    own["attention_mask"] = real.to(given.device).long()
    new_alone = cache.copies > 1 or _with_new_features(scheduled, cache, own)
    own["position_ids"] = _position_ids(scheduled, cache, own, real, new_alone)
    context = prompt_context(
        scheduled,
        own,
        labels,
        rules=cache.origin.rules,
        kind="prefill",
        rows=rows,
        copies=cache.copies,
    )
    follow_model(programs, cache, context.text_embeds, inputs.get(TURN))
    if context.masks:
        raise _refusal(f"layers of this model see {_masks(context)}")
    every_row = rows == "all" or context.states or "head" in programs.disabled
    output: Output = "all" if every_row else "chosen"
    variant = Variant(output=output, states=context.states, behind=True)
    executable = programs.executable(cache.origin, "prefill", variant)
    if cache.pool is not None:
        scheduled.log_once("images behind a prompt: these calls run without a graph")
    shown = {layer.segment: cache.log.shown(layer.segment) for layer in cache.layers}
    held, new = cache.append(context.layout.lengths)
    cache.linked = None
    context = replace(
        context, buffers=new, past=Past(buffers=held, shown=shown), real=real, kwargs=inputs
    )
    cache.running = True
    return PreparedCall(
        kind="prefill",
        variant=variant,
        executable=executable,
        context=context,
        tensors=filled(executable.specs, context, context.device),
        cache=cache,
    )


def _with_new_features(scheduled: ScheduledModel, cache: HidropCache, own: dict[str, Any]) -> bool:
    """Encode the images of a call, and leave those of earlier turns out where a call has all of them.

    Returns:
        True if the call had the new ones alone.
    """
    family, ids = scheduled.family, own.get("input_ids")
    if ids is None or len(set(scheduled.tokens)) < len(scheduled.tokens) or family.text_embeds:
        return True
    encoded = encode(family, scheduled.base, own)
    found, start, alone = {}, 0, True
    kinds = zip(family.modalities, scheduled.tokens, encoded.lengths, cache.log.had, strict=True)
    for kind, token, lengths, before in kinds:
        entries = encoded.features[start : start + len(lengths)]
        start += len(lengths)
        new = (ids == token).sum(dim=1).tolist()
        if int(before.sum()) and sum(lengths) == sum(new) + int(before.sum()):
            entries, alone = _behind(entries, before.tolist(), new), False
        if entries:
            found[kind.name] = KnownFeatures(entries)
        own[kind.pixels] = None
    own["mm_encoder_outputs"] = found
    return alone


def _behind(entries: Sequence[Tensor], before: list[int], new: list[int]) -> list[Tensor]:
    """Return the entries of each row that come behind so many places: of all turns' entries, row after row, the new ones'."""
    kept, rest = [], iter(entries)
    for row, (past, own) in enumerate(zip(before, new, strict=True)):
        taken = 0
        while taken < past + own:
            entry = next(rest)
            if taken < past < taken + len(entry):
                raise _refusal(
                    f"row {row} has {past} places of earlier turns, which is no whole number of its images"
                )
            if taken >= past:
                kept.append(entry)
            taken += len(entry)
    return kept


def _position_ids(
    scheduled: ScheduledModel,
    cache: HidropCache,
    own: dict[str, Any],
    real: Tensor,
    new_alone: bool,
) -> Tensor:
    """Return the ids [B, L], or [axes, B, L], that follow those in the cache, as the whole conversation has them."""
    family, following = scheduled.family, cache.log.next_ids("text").cpu()[:, None]
    if family.axes == 1:
        return following + (real.cumsum(dim=1) - 1).clamp(min=0)
    given = own.get("position_ids")
    if given is not None and given.dim() == 3:
        ids: Tensor = given[-family.axes :].cpu()
        first = real.int().argmax(dim=1)[:, None]
        if bool((ids.gather(2, first.expand(family.axes, -1, 1)) != following).any()):
            raise _refusal(
                f"position_ids go on at {ids[:, :, 0].tolist()} where the cache's next are {following.tolist()}"
            )
        return ids
    if not new_alone:
        raise _refusal("images of earlier turns came too, without position_ids")
    assert family.position_ids is not None
    made = family.position_ids(scheduled.base, own | {"position_ids": None})
    if made is None:
        raise _refusal(
            f"{type(scheduled.model).__name__} makes no position ids from these arguments"
        )
    made = made[-family.axes :].cpu() + following
    _note_delta(scheduled.base, cache, made, real)
    return made


def _note_delta(base: Any, cache: HidropCache, ids: Tensor, real: Tensor) -> None:
    """Note how far position ids are ahead of tokens, as the class does, which counts from there in turns of text."""
    past = cache.log.continued_mask(0)
    if past is None or not hasattr(base, "rope_deltas"):
        return
    last = real.int().cumsum(dim=1).argmax(dim=1)[:, None]
    ahead = ids.amax(dim=0).gather(1, last) + 1
    tokens = past.sum(dim=1).cpu() + real.sum(dim=1)
    base.rope_deltas = (ahead - tokens[:, None]).to(past.device)


def _obstacles(
    scheduled: ScheduledModel, cache: HidropCache, length: int, draft: int, differentiable: bool
) -> Iterator[str]:
    """Yield what stands in the way of images behind a cache."""
    yield from _of_schedule(scheduled.schedule)
    family, decoder = scheduled.family, cache.origin.decoder
    name = type(scheduled.model).__name__
    if family.beyond_features is not None:
        yield f"{name} has {family.beyond_features}"
    if recurrent_layers(scheduled.model) or scheduled.plan.tails:
        yield f"{name} has layers that do not attend"
    if decoder.sharded or decoder.processes is not None:
        yield "several processes hold this model"
    if decoder.placement is not None:
        yield "accelerate has placed this model on several devices, or holds its weights elsewhere"
    reach = cache.get_seq_length() + length
    for window in cache.origin.windows.values():
        if reach > window:
            yield f"layers of this model see {window} tokens back, and the conversation has {reach}"
    if draft:
        yield "an assistant's draft comes with them"
    if differentiable or (torch.is_grad_enabled() and cache.linked is not None):
        yield "gradients are enabled, which would end at what the cache holds; call under torch.no_grad()"


def _of_schedule(schedule: Schedule) -> Iterator[str]:
    for field in ("before", "reads", "bottleneck", "cache", "merge"):
        value = getattr(schedule, field)
        if value is not None:
            yield f"the schedule has {field}={value!r}"
    rule = schedule.position_rule
    if rule.renumbers_text or rule.renumbers_after_prunes or rule.closes_gaps:
        yield f"positions={schedule.positions!r} numbers tokens anew"
    scorer = schedule.scorer
    known = reads_attention(scorer) or scores_alone(scorer)
    if schedule.prune and not (known and not scorer.modules):
        yield f"score={schedule.score!r} reads more of the tokens in the cache than their keys"


def _masks(context: PromptContext) -> str:
    return ", ".join(f"{name} by {rule}" for name, rule in context.masks)


def _refusal(what: str) -> InputError:
    return InputError(
        f"images came with a cache that holds a prompt already, and {what}; pass the full conversation with "
        "past_key_values=None"
    )
