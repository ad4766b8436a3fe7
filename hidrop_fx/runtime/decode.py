"""The calls after a prefill: one new token a row, or a few, on a cache that holds the prompt.

prepared = prepare_decode(scheduled, programs, inputs, cache, rows="last", multiple=None)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.program.outputs import states_output
from hidrop_fx.program.variant import Variant
from hidrop_fx.runtime.call_context import DecodeContext, filled
from hidrop_fx.runtime.embedding import embedded
from hidrop_fx.runtime.idle_schedule import note_words_for_images
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.kv.layer import went_on
from hidrop_fx.runtime.output import DecoderOutput, Rows
from hidrop_fx.runtime.packing import check_unpacked
from hidrop_fx.runtime.prepared_call import PreparedCall
from hidrop_fx.runtime.programs import Programs
from hidrop_fx.runtime.prompt import check_inputs
from hidrop_fx.runtime.prompt_output import linked_outputs
from hidrop_fx.runtime.scheduled_model import ScheduledModel

TURN = "hidrop_turn"
"""Argument of forward by which the calls of one `generate` are known as such."""


@dataclass
class Turn:
    """One call of `generate`: nobody changes the model between its tokens."""

    followed: bool = False
    """The cache goes on with the decoder as it is."""


def prepare_decode(
    scheduled: ScheduledModel,
    programs: Programs,
    inputs: dict[str, Any],
    cache: HidropCache,
    rows: Rows,
    multiple: int | None,
) -> PreparedCall:
    """Make room for the tokens in every layer's cache, choose the program and fill its inputs.

    Args:
        rows: tokens whose hidden states are wanted: "all", or each row's "last".
        multiple: KV lengths are rounded up to a multiple of so many tokens, for graphs that serve
            several; None leaves them as they are.

    Raises:
        InputError: the inputs do not go on with the cache. CacheError: another model's or schedule's
            programs filled it.
    """
    embeds = _checked_embeddings(scheduled, programs, inputs, cache)
    follow_model(programs, cache, embeds, inputs.get(TURN))
    tokens = embeds.shape[1]
    states = scheduled.requests(inputs, "output_hidden_states")
    differentiable = _is_differentiable(scheduled, programs, cache, embeds)
    recorded = (
        multiple is not None
        and not differentiable
        and _can_be_recorded(scheduled, cache, tokens, states)
    )
    valid = past_and_new(scheduled, inputs, cache, tokens)
    before = cache.log.advanced
    columns = cache.extend(valid, tokens)
    length, windows = cache.get_seq_length(), cache.origin.windows
    too_long = any(length > window for window in windows.values())
    masked = cache.log.ragged or too_long or tokens > 1 or recorded
    variant = Variant(masked=masked, states=states, differentiable=differentiable)
    executable = programs.executable(cache.origin, "decode", variant)
    spans, buffers = None, None
    if recorded and multiple is not None and cache.pool is not None:
        spans = cache.spans(multiple)
        buffers = cache.pool.place(cache, spans)
    if buffers is None:
        spans, recorded = None, False
        buffers = cache.differentiable(tokens) if differentiable else cache.views()
    if not differentiable:
        cache.linked = None
    context = DecodeContext(
        cache=cache,
        rows=rows,
        states=states,
        embeds=embeds,
        valid=valid,
        before=before,
        columns=columns,
        windows=windows,
        spans=spans,
        kwargs=inputs,
        buffers=buffers,
    )
    cache.running = True
    with torch.set_grad_enabled(differentiable):
        tensors = filled(executable.specs, context, embeds.device)
    return PreparedCall(
        kind="decode",
        variant=variant,
        executable=executable,
        context=context,
        tensors=tensors,
        cache=cache,
        recorded=recorded,
    )


def decode_output(
    prepared: PreparedCall, context: DecodeContext, outputs: dict[str, Tensor]
) -> DecoderOutput:
    """Return the rows that the call asked for."""
    hidden, valid, program = outputs["hidden"], context.valid, prepared.executable.program
    if prepared.variant.differentiable:
        context.cache.write(linked_outputs(program, outputs), context.embeds.shape[1])
    chosen = _last_valid(hidden, valid) if context.rows == "last" and valid is not None else hidden
    states = None
    if context.states:
        states = (*(outputs[states_output(k)] for k in range(len(program.regions))), hidden)
    return DecoderOutput(
        hidden=chosen,
        columns=None,
        cache=context.cache,
        features={},
        hidden_states=states,
        extras={name: outputs[name] for name in program.extras},
    )


def _last_valid(hidden: Tensor, valid: Tensor) -> Tensor:
    """Return each row's last real token [B, 1, D]; a row without a real token gives its last."""
    valid = valid.to(hidden.device)
    places = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid.any(dim=1), (valid * places).amax(dim=1), places[-1])
    return hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]


# Checks of a call against its cache.


def _checked_embeddings(
    scheduled: ScheduledModel, programs: Programs, inputs: dict[str, Any], cache: HidropCache
) -> Tensor:
    """Return the embeddings [B, q, D] of the new tokens."""
    check_inputs(scheduled, inputs)
    check_unpacked(inputs)
    ids: Tensor | None = inputs.get("input_ids")
    if ids is None:
        embeds: Tensor = inputs["inputs_embeds"]
    else:
        note_words_for_images(scheduled, ids)
        embeds = embedded(scheduled.embedding, scheduled.words(ids))
    check_cache(programs, cache, len(embeds))
    return embeds


def check_cache(programs: Programs, cache: HidropCache, rows: int) -> None:
    """Raise unless programs can go on with a cache for so many rows."""
    if rows != cache.batch_size:
        raise InputError(
            f"the call has {rows} rows, its cache {cache.batch_size}; bring the cache to the "
            "batch with batch_repeat_interleave or batch_select_indices"
        )
    if not programs.fills(cache.origin):
        raise _outdated()
    if cache.torn:
        raise CacheError(
            "a call behind this prompt failed while it ran, and the recurrent layers of the model stand between two "
            "tokens; pass the whole text with past_key_values=None"
        )


def _is_differentiable(
    scheduled: ScheduledModel, programs: Programs, cache: HidropCache, embeds: Tensor
) -> bool:
    """Return True if anything that the outputs of the decoder depend on requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    if cache.linked is None and not embeds.requires_grad and not programs.trains(cache.origin):
        return False
    if cache.pool is not None:
        scheduled.log_once(
            "gradients behind a prompt: these calls run without a graph; torch.no_grad() leaves them out"
        )
    if cache.linked is None:
        scheduled.log_once(
            "gradients behind a prompt: what its cache holds was computed without them, and is a constant; "
            "those of this call go through the new tokens alone. For the prompt's, fill the cache with "
            "gradients enabled too; torch.no_grad() leaves all of them out"
        )
    return True


def follow_model(
    programs: Programs, cache: HidropCache, embeds: Tensor, turn: "Turn | None"
) -> None:
    """Let the decoder as it is now go on with a cache that it filled in another state, as HF's would.

    The new tokens see the keys and values that are there; what an adapter that was switched off, merged
    or scaled meanwhile does to the tokens themselves must be that of now.
    """
    if turn is not None and turn.followed:
        return
    before, now = cache.origin, programs.capture()
    if before is not now:
        held = cache.layers[0]
        device = embeds.device if now.devices is None else now.devices[0]
        same_place = (held.dtype, held.device) == (embeds.dtype, device)
        if not same_place or (before.kv_shapes, before.windows) != (now.kv_shapes, now.windows):
            raise _outdated()
        cache.origin = now
    if turn is not None:
        turn.followed = True


def _outdated() -> CacheError:
    return CacheError(
        "past_key_values was filled under another schedule, or before the model changed; pass "
        "the whole text with past_key_values=None"
    )


def _can_be_recorded(
    scheduled: ScheduledModel, cache: HidropCache, tokens: int, states: bool
) -> bool:
    if cache.pool is None:
        return False
    if tokens == 1 and not states:
        return True
    what = "output_hidden_states" if states else "several tokens at once"
    scheduled.log_once(f"{what} after a prompt: these calls run without a graph")
    return False


def past_and_new(
    scheduled: ScheduledModel, inputs: dict[str, Any], cache: HidropCache, tokens: int
) -> Tensor | None:
    """Check the mask and position ids of a decode call against the cache.

    Returns:
        bool [B, tokens], true for real tokens; None if all are.
    """
    mask = inputs.get("attention_mask")
    new = None
    if mask is not None:
        expected = (cache.batch_size, cache.get_seq_length() + tokens)
        if tuple(mask.shape) != expected:
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}; with this cache it must cover "
                f"the past and the new tokens, {expected}"
            )
        mask = mask.to(cache.log.first_column.device).bool()
    ids = inputs.get("position_ids")
    if ids is not None:
        ids = ids.to(cache.log.first_column.device)
    rule, reduces = scheduled.schedule.position_rule, scheduled.schedule.before is not None
    renumbered = rule.renumbers_text or (
        reduces and (rule.renumbers_after_prunes or rule.closes_gaps)
    )
    if renumbered or cache.log.padded_right:
        ids = None  # behind padding on the right, transformers counts from the padding
    elif ids is not None and ids.dim() == 3:
        # The axes of a token behind the prompt agree; ids of the text alone may come first.
        ids = ids[-scheduled.family.axes :]
    if _goes_on(mask, ids, cache, tokens):
        return None
    if mask is not None and not cache.log.continues(mask):
        shown = cache.log.new_columns
        cache.log.hide(mask[:, :-tokens])
        if cache.recurrent and cache.log.new_columns is not shown:
            raise went_on("attention_mask hides tokens behind the prompt that it showed before")
        new = None if bool(mask[:, -tokens:].all()) else mask[:, -tokens:]
    if ids is not None and new is None:
        _check_positions(ids, cache, tokens)
    return new


def _goes_on(mask: Tensor | None, ids: Tensor | None, cache: HidropCache, tokens: int) -> bool:
    """Return True if mask and position ids are those of new tokens that all are real.

    One comparison of both on a device, since the host waits for it in each.
    """
    given, known = [], []
    if mask is not None:
        shown = cache.log.continued_mask(tokens)
        if shown is None:
            return False
        given.append(mask)
        known.append(shown)
    if ids is not None:
        found, expected = _positions(ids, cache, tokens)
        given.append(found)
        known.append(expected)
    if len(given) == 2 and known[0].device.type != "cpu":
        given, known = ([torch.cat([v.flatten() for v in each])] for each in (given, known))
    return all(map(torch.equal, given, known))


def _positions(ids: Tensor, cache: HidropCache, tokens: int) -> tuple[Tensor, Tensor]:
    """Return position ids and those that are next in the cache, both [B, q] or [axes, B, q]."""
    expected = cache.log.next_ids("text")[:, None]
    if tokens > 1:
        expected = expected + torch.arange(tokens, device=ids.device)
    given = ids.expand(*ids.shape[:-2], *expected.shape)
    return given, expected.expand_as(given)


def _check_positions(ids: Tensor, cache: HidropCache, tokens: int) -> None:
    given, expected = _positions(ids, cache, tokens)
    if not torch.equal(given, expected):
        raise InputError(
            f"position_ids {ids.tolist()} do not continue the cache, whose next are "
            f"{expected.tolist()}; leave position_ids out. (Assisted decoding and prompt lookup count "
            "from the start: they cannot go on with a cache, pass the whole text without one)"
        )
