"""The calls after a prefill: one new token a row, or a few, on a cache that holds the prompt."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.lowering.executable import Executable
from hidrop_fx.passes.kv_cache import mask_name
from hidrop_fx.pipeline.pipeline import Variant
from hidrop_fx.runtime.cuda_graphs.runner import GraphRunner
from hidrop_fx.runtime.kv.cache import INVALID, HidropCache
from hidrop_fx.runtime.output import DecoderOutput, Rows

if TYPE_CHECKING:
    from hidrop_fx.runtime.runtime import Runtime


def decode(
    runtime: "Runtime", inputs: dict[str, Any], cache: HidropCache, rows: Rows
) -> DecoderOutput:
    """Append the tokens to every layer's cache; nothing is, where that fails."""
    if _has_images(inputs, runtime.family.pixels):
        raise InputError(
            "images came with a cache that holds a prompt already; vision tokens are chosen for "
            "the whole prompt, so pass the full conversation with past_key_values=None. "
            "(generate does this where prefill_chunk_size is set: leave it unset)"
        )
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if embeds is None:
        embeds = runtime.decoder.get_input_embeddings()(ids)
    if len(embeds) != cache.batch_size:
        raise InputError(
            f"the call has {len(embeds)} rows, its cache {cache.batch_size}; bring the cache to the "
            "batch with batch_repeat_interleave or batch_select_indices"
        )
    if cache.origin not in runtime.captures.values():
        raise CacheError(
            "past_key_values was filled under another schedule, or before the model changed; pass "
            "the whole text with past_key_values=None"
        )
    with cache.all_or_nothing():
        return _appended(runtime, inputs, cache, embeds, rows)


def _appended(
    runtime: "Runtime", inputs: dict[str, Any], cache: HidropCache, embeds: Tensor, rows: Rows
) -> DecoderOutput:
    capture, tokens = cache.origin, embeds.shape[1]
    valid = _past_and_new(runtime, inputs, cache, tokens)
    before = cache.advanced
    columns = cache.extend(valid, tokens)
    windows = [w for w in capture.windows.values() if cache.get_seq_length() > w]
    wanted = runtime.wants(inputs, "output_hidden_states")
    graphs = _graphs(runtime, cache, tokens, wanted)
    masked = cache.ragged or bool(windows) or tokens > 1 or graphs is not None
    run = runtime.executable(capture, "decode", Variant(masked=masked, states=wanted))
    spans = buffers = None
    if graphs is not None:
        spans = cache.spans(runtime.options.bucket_multiple)
        buffers = graphs.pool.place(cache, spans)
    if buffers is None:
        graphs = spans = None
        buffers = cache.views()
    with torch.no_grad():
        tensors = _decode_inputs(run, cache, before, embeds, valid) | buffers
        if masked:
            tensors |= _masks(set(run.inputs), cache, columns, spans)
        outputs = run(tensors) if graphs is None else graphs(run, tensors, buffers)
    hidden = outputs["hidden"]
    chosen = _last_valid(hidden, valid) if rows == "last" and valid is not None else hidden
    between = (outputs[f"states_{k}"] for k in range(len(run.program.regions))) if wanted else ()
    return DecoderOutput(
        hidden=chosen,
        columns=None,
        cache=cache,
        features=None,
        hidden_states=(*between, hidden) if wanted else None,
        extras={name: outputs[name] for name in run.program.extras},
    )


def _last_valid(hidden: Tensor, valid: Tensor) -> Tensor:
    """[B, 1, D]; a row without a real token gives its last."""
    places = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid.any(dim=1), (valid * places).amax(dim=1), places[-1])
    return hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]


def _decode_inputs(
    run: Executable,
    cache: HidropCache,
    before: Tensor,
    embeds: Tensor,
    valid: Tensor | None,
) -> dict[str, Tensor]:
    """All inputs but buffers and masks.

    Args: before: real tokens [B] between the prompt and these.
    """
    tokens = embeds.shape[1]
    behind = before[:, None]
    if valid is not None:
        behind = behind + (valid.cumsum(dim=1) - 1).clamp(min=0)
    elif tokens > 1:
        behind = behind + torch.arange(tokens, device=embeds.device)
    wanted = set(run.inputs)
    first = run.program.segments[0].name
    tensors = {
        "inputs_embeds": embeds,
        "position_ids": cache.first_ids[first][:, None] + behind,
    }
    for name, prompt in cache.prompt_columns.items():
        if f"slots_{name}" not in wanted:
            continue
        filled = prompt.shape[1] + cache.generated
        tensors[f"slots_{name}"] = torch.arange(filled - tokens, filled, device=embeds.device)
        if f"position_ids_{name}" in wanted:
            tensors[f"position_ids_{name}"] = cache.first_ids[name][:, None] + behind
    return tensors


def _masks(
    wanted: Collection[str],
    cache: HidropCache,
    columns: Tensor,
    spans: Mapping[str, int] | None,
) -> dict[str, Tensor]:
    """Wanted masks, bool [B, 1, q, S], as wide as the buffers' views."""
    since = cache.new_columns
    if spans is not None:
        name, span = next(iter(spans.items()))
        # The same in every segment.
        room = span - cache.prompt_columns[name].shape[1] - since.shape[1]
        since = torch.cat([since, since.new_full((len(since), room), INVALID)], dim=1)
    seen = visible(since, columns, None)
    masks = {}
    for name, prompt in cache.prompt_columns.items():
        for window in (None, *cache.origin.windows.values()):
            mask = mask_name(name, window)
            if mask not in wanted:
                continue
            if window is None:  # no token behind the prompt is too early for one of the prompt
                shown = cache.prompt_shown(name).expand(-1, -1, columns.shape[1], -1)
                masks[mask] = torch.cat([shown, seen], dim=3)
            else:
                masks[mask] = visible(torch.cat([prompt, since], dim=1), columns, window)
    return masks


def _graphs(
    runtime: "Runtime", cache: HidropCache, tokens: int, wants_states: bool
) -> GraphRunner | None:
    if cache.pool is None:
        return None
    if tokens == 1 and not wants_states:
        return runtime.graphs
    what = "output_hidden_states" if wants_states else "several tokens at once"
    runtime.once(f"{what} after a prompt: these calls run without a graph")
    return None


def _past_and_new(
    runtime: "Runtime", inputs: dict[str, Any], cache: HidropCache, tokens: int
) -> Tensor | None:
    """Hold the mask and position ids of a decode call against the cache.

    Returns:
        Which of the new tokens are real, bool [B, tokens]; None if all are.
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
        mask = mask.to(cache.first_column.device).bool()
        if not cache.goes_on_with(mask):
            cache.hide(mask[:, :-tokens])
            new = None if bool(mask[:, -tokens:].all()) else mask[:, -tokens:]
    ids = inputs.get("position_ids")
    if ids is not None and new is None and not runtime.schedule.position_rule.renumbers_text:
        _check_positions(runtime, ids, cache, tokens)
    return new


def _check_positions(runtime: "Runtime", ids: Tensor, cache: HidropCache, tokens: int) -> None:
    if cache.padded_right:
        return  # behind padding on the right, transformers counts from the padding
    expected = cache.next_ids["text"][:, None] + torch.arange(tokens, device=ids.device)
    if not torch.equal(ids.expand_as(expected), expected):
        raise InputError(
            f"position_ids {ids.tolist()} do not continue the cache, whose next are "
            f"{expected.tolist()}; leave position_ids out. (Assisted decoding and prompt lookup count "
            "from the start: they cannot go on with a cache, pass the whole text without one)"
        )


def visible(known: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which cached tokens [B, filled] the new ones [B, q] see: bool [B, 1, q, filled]."""
    # The sentinel's column is the largest number: later than every query, hence unseen.
    known, columns = known[:, None, None], columns[:, None, :, None]
    mask = known <= columns
    if window is not None:
        mask &= known > columns - window
    return mask


def _has_images(inputs: dict[str, Any], pixels: str) -> bool:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    return encoded is not None or inputs.get(pixels) is not None
