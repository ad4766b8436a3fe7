"""`generate`, and what it does before its first forward: the cache it makes, the images it encodes."""

import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from hidrop_fx.capture.layers import base_of
from hidrop_fx.capture.placement import offloads
from hidrop_fx.capture.sharded import is_sharded
from hidrop_fx.errors import CacheError, InputError
from hidrop_fx.models import family_of
from hidrop_fx.models.encoding import encode
from hidrop_fx.models.without_attention import recurrent_layers
from hidrop_fx.planning.batch_layout import count_images
from hidrop_fx.runtime.decode import TURN, Turn
from hidrop_fx.runtime.hf.override import call_replaced, signature_of
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.prompt import places_of_kinds
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.runtime.vision import overlap_lengths

CACHE = "_prepare_cache_for_generation"
PIXELS = "_maybe_prepare_encoder_kwargs_for_generation"
COPIES = "_expand_multimodal_outputs"


def generate(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Generate under the schedule in use, which `hidrop_schedule` may name: transformers does not know that argument."""
    return call_replaced(model, "generate", *args, **kwargs)


def prepare_cache(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> None:
    """Give generate a cache of ours, sized for the call."""
    bound = signature_of(getattr(type(model), CACHE)).bind(model, *args, **kwargs).arguments
    config, model_kwargs = bound["generation_config"], bound["model_kwargs"]
    if config.prefill_chunk_size is not None:
        raise InputError(
            f"prefill_chunk_size={config.prefill_chunk_size}: vision tokens are scored over the "
            "whole prompt, which cannot be cut in chunks; leave prefill_chunk_size unset"
        )
    if config.use_cache is False and not runtime.schedule.identity:
        raise InputError(
            "use_cache=False: without a cache every new token would choose other tokens; a schedule "
            "scores once, in prefill. Leave use_cache on"
        )
    if config.cache_implementation not in (None, "dynamic"):
        raise CacheError(
            f"cache_implementation={config.cache_implementation!r}: a compiled model brings its "
            "own cache, with another length in every layer; leave cache_implementation unset"
        )
    given = model_kwargs.get("past_key_values")
    if given is not None and not isinstance(given, HidropCache):
        raise CacheError(
            f"past_key_values is a {type(given).__name__}; a compiled model takes only the cache "
            "that its own forward or generate returned, or None"
        )
    assisted = bound["generation_mode"] is GenerationMode.ASSISTED_GENERATION
    if assisted and is_sharded(model):
        raise InputError(
            "assisted decoding and prompt lookup encode images outside the model's forward, where fully_shard or ZeRO-3 has "
            "gathered no parameters; leave the assistant out"
        )
    if assisted and runtime.schedule.cache is not None:
        raise InputError(
            f"cache={runtime.schedule.cache} is for one token after the other: a draft comes with the prompt and is "
            "checked against all of it, before its cache is cut, so that assisted decoding and prompt lookup would "
            "answer otherwise. Leave the assistant out"
        )
    if assisted and recurrent_layers(model):
        raise InputError(
            f"assisted decoding and prompt lookup take drafted tokens back, and {type(model).__name__} has recurrent layers, "
            "whose states have seen them then; leave the assistant out"
        )
    # An assistant would be given the same arguments.
    if not assisted and _takes_any_keyword(model.forward):
        model_kwargs[TURN] = Turn()
    if given is not None:
        given._is_user_defined = True
        given.speculative = assisted
        given.copies = _copies(model, config, pixels=_reads_pixels(runtime))
    elif config.use_cache is not False:
        if assisted and model_kwargs.get("pixel_values") is not None:  # not for the assistant
            _encode_before(model, model_kwargs)
        # transformers leaves out the last token, which is never fed back.
        length = bound["max_cache_length"] + 1
        cache = HidropCache(max_length=length)
        # Prompt and draft come together, with a row of logits for each token of the draft.
        cache.speculative = assisted
        cache.copies = _copies(model, config, pixels=_reads_pixels(runtime))
        model_kwargs["past_key_values"] = cache
    elif _copies(model, config, pixels=_reads_pixels(runtime)) > 1 and any(
        k.given(model_kwargs) for k in family_of(model).modalities
    ):
        runtime.log_once(
            "use_cache=False with beams or several answers: this transformers repeats each image by itself, and "
            "rows of several images get those of others; leave use_cache on"
        )


def _encode_before(model: Any, model_kwargs: dict[str, Any]) -> None:
    """Encode images where transformers has a step for it; older ones pass pixels to the first forward."""
    encode = getattr(model, "_prepare_multimodal_encoder_kwargs_for_generation", None)
    if encode is not None:
        encode(model_kwargs)


def _copies(model: Any, config: Any, *, pixels: bool = False) -> int:
    """Return how often generate repeated each image by itself, as transformers does that encodes them later.

    The images of a row do not stay together then, except where a class repeats them in its own way.

    Args:
        pixels: they are left to the first forward, whatever the version.
    """
    own = (
        type(model)._expand_inputs_for_generation
        is not GenerationMixin._expand_inputs_for_generation
    )
    if own or (hasattr(model, PIXELS) and not pixels):
        return 1
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def _reads_pixels(runtime: Runtime) -> bool:
    """Return True if the first forward needs pixels: for a stage before the decoder, or to gather or load the tower's parameters."""
    if is_sharded(runtime.model) or offloads(base_of(runtime.model)):
        return True
    reduction = runtime.schedule.reduction
    return reduction is not None and reduction.reducer.reads_pixels


def keep_pixels(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Leave the images of generate as pixels where the tower overlaps; else encode them, as it would.

    Prefill encodes them beside its text-only layers.
    """
    bound = signature_of(getattr(type(model), PIXELS)).bind(model, *args, **kwargs).arguments
    config, model_kwargs = bound["generation_config"], bound["model_kwargs"]
    for kind in family_of(model).modalities:
        if kind.completed is not None:
            model_kwargs |= kind.completed(model.config, model_kwargs)
    rows = max(config.num_beams or 1, config.num_return_sequences or 1)
    overlap = runtime.overlaps_vision and rows == 1  # more would repeat the pixels, not in order
    if _reads_pixels(runtime):
        return model_kwargs
    if overlap and overlap_lengths(runtime.model, model_kwargs) is not None:
        return model_kwargs
    return call_replaced(model, PIXELS, *args, **kwargs)


def keep_together(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Repeat encoded images for beams and several answers, those of a row together.

    Some classes have an older way of their own, in which a row of images A, B becomes one of A, A and one of B, B.
    """
    own = getattr(type(model), COPIES)
    bound = signature_of(own).bind(model, *args, **kwargs).arguments
    ids, size = bound.get("input_ids"), bound.get("expand_size", 1)
    if own is getattr(GenerationMixin, COPIES) or ids is None or not ids.numel():
        return call_replaced(model, COPIES, *args, **kwargs)
    outputs: dict[str, Any] = bound["mm_encoder_output"]
    scheduled = runtime.scheduled
    given = {"input_ids": ids, "mm_encoder_outputs": outputs}
    lengths = encode(scheduled.family, scheduled.base, given).lengths
    places = places_of_kinds(scheduled, given)
    for kind, shown, tokens in zip(scheduled.family.modalities, places, lengths, strict=True):
        output = outputs.get(kind.name)
        if output is None:
            continue
        order, start = [], 0
        for count in count_images(shown, tokens, kind.name):
            order += [*range(start, start + count)] * size
            start += count
        _put_in_order(output, order)
    return outputs


def _put_in_order(output: Any, order: list[int]) -> None:
    """Let an encoder's output have its entries in another order, some of them several times."""
    pooled, added = output.pooler_output, getattr(output, "deepstack_features", None)
    if isinstance(pooled, Tensor):
        output.pooler_output = pooled[order]
    elif pooled is not None:
        output.pooler_output = [pooled[k] for k in order]
    if added is not None:
        output.deepstack_features = [
            (layer[0], [layer[1][k] for k in order])
            if isinstance(layer[0], int)
            else [layer[k] for k in order]
            for layer in added
        ]


def _takes_any_keyword(function: Any) -> bool:
    """Return True unless a forward that somebody else put there would not know an argument of ours."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)
