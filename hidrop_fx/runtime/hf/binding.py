"""Put a runtime into a model, and take it out again: instance attributes only.

    model.forward, model.model.forward, model._prepare_cache_for_generation
    model.save_pretrained, model.train

Nothing else of the model changes: parameters, state dict and class stay as they are. Hooks on the model,
its vision tower, projector and head run as before; hooks inside the text decoder do not, since its
layers are not called one by one.
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.generation.configuration_utils import GenerationMode

from hidrop_fx.errors import CacheError, HidropError, InputError
from hidrop_fx.models import family_of
from hidrop_fx.planning import plan
from hidrop_fx.runtime.hf.override import Override
from hidrop_fx.runtime.hf.tower import tower_overrides
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import Rows
from hidrop_fx.runtime.runtime import RATIOS, Runtime
from hidrop_fx.runtime.vision import overlap_lengths
from hidrop_fx.training.loss import gathered_labels, share_of_step, supervision
from hidrop_fx.training.ratios import Ratios
from hidrop_fx.training.sidecar import write_sidecar

_ATTRIBUTE = "_hidrop_runtime"
_ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"
_LABELS: ContextVar[tuple[Any, Tensor | None]] = ContextVar("labels", default=(None, None))


class BaseForward(Override):
    """`model.model.forward`: hidden states of the full length."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.arguments(args, kwargs)
        states = self.runtime.call(inputs, labels=noted_labels(self.runtime.model))
        output = family_of(self.runtime.model).base_output(
            last_hidden_state=states.hidden,
            past_key_values=states.cache,
            hidden_states=states.hidden_states,
            image_hidden_states=states.features,
        )
        return output if _wants_dict(self.runtime, inputs) else output.to_tuple()


class Forward(Override):
    """`model.forward`: logits, and HF's own loss where labels are given.

    `logits_to_keep=1` gives the last *valid* row of each sample, also where padding is on the right.
    In training with labels the head and the loss see the text stream alone: `logits` are [B, T, V],
    the rows at `logit_columns` [B, T] of the output.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(self.arguments(args, kwargs))
        labels = inputs.pop("labels", None)
        keep = inputs.pop("logits_to_keep", 0)
        model = self.runtime.model
        loss_inputs = {k: v for k, v in inputs.items() if k not in self.__signature__.parameters}
        rows: Rows = "all"
        if labels is None and isinstance(keep, int) and keep == 1:
            rows = "last"
        elif labels is not None and model.training and isinstance(keep, int) and keep == 0:
            rows = "text"
        supervised = supervision(labels, loss_inputs)
        states = self.runtime.call(
            inputs, labels=supervised, rows=rows, draft=_draft(inputs.get("past_key_values"), keep)
        )
        logits = model.get_output_embeddings()(rows_to_keep(states.hidden, keep))
        loss = None
        if labels is not None:
            vocabulary = model.config.get_text_config().vocab_size
            targets = {"labels": labels}
            if states.columns is not None:
                targets = gathered_labels(labels, states.columns, loss_inputs)
            loss = model.loss_function(
                logits=logits, vocab_size=vocabulary, **{**loss_inputs, **targets}
            )
            if supervised is not None and model.training and self.runtime.ratios is not None:
                share = share_of_step(supervised, loss_inputs)
                loss = loss + share * self.runtime.ratios.penalty().to(loss.device)
        output = family_of(self.runtime.model).output(
            loss=loss,
            logits=logits,
            past_key_values=states.cache,
            hidden_states=states.hidden_states,
            image_hidden_states=states.features,
        )
        if states.columns is not None:
            output.logit_columns = states.columns
        if states.extras:
            output.pass_outputs = states.extras
        return output if _wants_dict(self.runtime, inputs) else output.to_tuple()


class PrepareCache(Override):
    """`model._prepare_cache_for_generation`: generate gets a cache of ours, sized for the call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs).arguments
        config, model_kwargs = bound["generation_config"], bound["model_kwargs"]
        if config.prefill_chunk_size is not None:
            raise InputError(
                f"prefill_chunk_size={config.prefill_chunk_size}: vision tokens are scored over the "
                "whole prompt, which cannot be cut in chunks; leave prefill_chunk_size unset"
            )
        if config.use_cache is False and not self.runtime.schedule.identity:
            raise InputError(
                "use_cache=False: without a cache every new token would choose other vision tokens; a "
                "schedule scores once, in prefill. Leave use_cache on"
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
        if given is not None:
            given._is_user_defined = True
            given.speculative = assisted
        elif config.use_cache is not False:
            if assisted and model_kwargs.get("pixel_values") is not None:  # not for the assistant
                self.owner._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
            # transformers leaves out the last token, which is never fed back.
            length = bound["max_cache_length"] + 1
            cache = HidropCache(max_length=length)
            # Prompt and draft come together, with a row of logits for each token of the draft.
            cache.speculative = assisted
            model_kwargs["past_key_values"] = cache


class KeepPixels(Override):
    """`model._maybe_prepare_encoder_kwargs_for_generation`: generate would encode the images first.

    Where the tower overlaps they stay pixels, for prefill to encode beside its text-only layers.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs).arguments
        config, model_kwargs = bound["generation_config"], bound["model_kwargs"]
        rows = max(config.num_beams or 1, config.num_return_sequences or 1)
        overlap = (
            self.runtime.overlaps_vision and rows == 1
        )  # more would repeat the pixels, not in order
        if overlap and overlap_lengths(self.runtime.model, model_kwargs) is not None:
            return model_kwargs
        return self.original(*args, **kwargs)


class NoteLabels(Override):
    """Around a forward that another library put in the place of ours, e.g. TRL's fused head.

    Such a forward calls the model without its head and keeps the labels to itself; the scores of a
    schedule need to know them.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loss_inputs = {"shift_labels": kwargs.get("shift_labels")}
        labels = supervision(self.arguments(args, kwargs).get("labels"), loss_inputs)
        if self.owner.training and self.runtime.ratios is not None:
            self.runtime.log_once(
                "another library's forward computes the loss: the budget term of selection='dtopk' is "
                "not part of it; add model.hidrop_ratios.penalty() to hold the number of tokens"
            )
        token = _LABELS.set((self.owner, labels))
        try:
            return self.original(*args, **kwargs)
        finally:
            _LABELS.reset(token)


class Train(Override):
    """`model.train`, which trainers call before a step: time to see whether forward was replaced."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.original(*args, **kwargs)
        ours = (Forward, NoteLabels)
        if not isinstance(self.owner.__dict__.get("forward"), ours):
            _, overrides = self.owner.__dict__[_ATTRIBUTE]
            wrapper = NoteLabels(self.owner, "forward", self.runtime)
            wrapper.install()
            overrides.append(wrapper)
        return found


class SavePretrained(Override):
    """`model.save_pretrained`: the schedule, and what it learned, go beside the weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.arguments(args, kwargs)
        if given.get("is_main_process", True):
            write_sidecar(given["save_directory"], self.runtime.schedule, self.runtime.ratios)
        return self.original(*args, **kwargs)


def noted_labels(model: Any) -> Tensor | None:
    """Labels of the forward that runs now, where it kept them to itself."""
    owner, labels = _LABELS.get()
    return labels if owner is model else None


def bind(model: Any, runtime: Runtime, wrapper: Any = None, ratios: Ratios | None = None) -> None:
    """Let `runtime` run in place of the model's forward.

    Args:
        wrapper: PEFT's model around this one, if there is: it saves itself.
        ratios: what was learned under this schedule before; None begins with its own counts.
    """
    overrides: list[Override] = [
        Forward(model, "forward", runtime),
        BaseForward(model.model, "forward", runtime),
        PrepareCache(model, "_prepare_cache_for_generation", runtime),
        SavePretrained(model, "save_pretrained", runtime),
        Train(model, "train", runtime),
    ]
    if hasattr(model, _ENCODES):  # where transformers has no such step, forward gets pixels
        overrides.append(KeepPixels(model, _ENCODES, runtime))
    overrides += tower_overrides(runtime)
    if wrapper is not None and wrapper is not model:
        overrides.append(SavePretrained(wrapper, "save_pretrained", runtime))
    if runtime.schedule.learns:
        found = Ratios(plan(runtime.schedule, model)).to(model.device) if ratios is None else ratios
        setattr(model, RATIOS, found)
    for override in overrides:
        override.install()
    model.__dict__[_ATTRIBUTE] = (runtime, overrides)


def unbind(model: Any) -> None:
    """Give the model its own forward back."""
    runtime, overrides = model.__dict__[_ATTRIBUTE]
    while isinstance(overrides[-1], NoteLabels):
        overrides.pop().remove()
    lost = [override.name for override in overrides if not override.in_force]
    if lost:
        raise HidropError(
            f"{', '.join(lost)} of this model was replaced after hidrop.compile; take that wrapper off "
            "first, so that it is not lost"
        )
    del model.__dict__[_ATTRIBUTE]
    for override in reversed(overrides):
        override.remove()
    if hasattr(model, RATIOS):
        delattr(model, RATIOS)
    if runtime.graphs is not None:
        runtime.graphs.release()


def runtime_of(model: Any) -> Runtime | None:
    """The runtime of a compiled model, None for any other."""
    found = getattr(unwrapped(model), "__dict__", {}).get(_ATTRIBUTE)
    return None if found is None else found[0]


def unwrapped(model: Any) -> Any:
    """The transformers model in PEFT's, DDP's and torch.compile's wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def _draft(cache: Any, keep: int | Tensor) -> int:
    """Tokens behind the prompt in the first call of assisted decoding."""
    starts = isinstance(cache, HidropCache) and cache.speculative and cache.get_seq_length() == 0
    return keep - 1 if starts and isinstance(keep, int) and keep > 1 else 0


def rows_to_keep(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """The rows of `hidden` [B, L, D] that `logits_to_keep` asks for, as transformers slices them."""
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    if not isinstance(keep, Tensor) or keep.dim() < 2:
        return hidden[:, keep]
    if keep.dtype == torch.bool:
        return hidden[keep]
    return hidden.gather(1, keep[:, :, None].expand(-1, -1, hidden.shape[2]))


def _wants_dict(runtime: Runtime, inputs: dict[str, Any]) -> bool:
    wanted = inputs.get("return_dict")
    if wanted is None:
        wanted = getattr(runtime.model.config, "return_dict", True)
    return bool(wanted)
