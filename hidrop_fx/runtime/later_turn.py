"""A prompt with images behind what a cache holds: its tokens follow the schedule, those that are there stay as they were chosen.

prepared = prepare_turn(scheduled, programs, inputs, cache, labels, rows, draft)

What each layer keeps of the turn goes behind what its cache holds; afterwards the cache is that of one longer prompt.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import InputError
from hidrop_fx.methods.scoring import reads_attention, scores_alone
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
        inputs: tokens of the turn alone, [B, L], its images, and a mask of the past and the turn, if any.

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
    real = past_and_new(scheduled, inputs, cache, length)
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=given.device)
    real = real.cpu()
    own = {k: v for k, v in inputs.items() if k not in ("past_key_values", "position_ids")}
    own |= {"attention_mask": real.long(), "position_ids": _position_ids(cache, real)}
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


def _position_ids(cache: HidropCache, real: Tensor) -> Tensor:
    """Return the ids [B, L] that follow those in the cache, one for each real token, as the whole conversation has them."""
    local = (real.cumsum(dim=1) - 1).clamp(min=0)
    return cache.log.next_ids("text").cpu()[:, None] + local


def _obstacles(
    scheduled: ScheduledModel, cache: HidropCache, length: int, draft: int, differentiable: bool
) -> Iterator[str]:
    """Yield what stands in the way of images behind a cache."""
    yield from _of_schedule(scheduled.schedule)
    family, decoder = scheduled.family, cache.origin.decoder
    name = type(scheduled.model).__name__
    if family.axes > 1:
        yield f"{name} gives tokens position ids on {family.axes} axes"
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
