"""A model's forward, and its base's: logits and loss of the compiled programs.

model.forward(input_ids, pixel_values, labels)        # forward
model.model.forward(input_ids, pixel_values)          # base_forward, without the head
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hidrop_fx.models import family_of
from hidrop_fx.runtime.hf.moving import moving, with_tensors_of_base
from hidrop_fx.runtime.hf.override import arguments, signature_of
from hidrop_fx.runtime.hf.replaced import labels_of_caller
from hidrop_fx.runtime.kv.cache import HidropCache
from hidrop_fx.runtime.output import Rows
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.training.loss import (
    gathered_labels,
    labels_behind_tokens,
    share_of_step,
    supervision,
)


def forward(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Return logits, and HF's own loss where labels are given.

    `logits_to_keep=1` gives the last *valid* row of each sample, also where padding is on the right.
    In training with labels the head and the loss see the text stream alone: `logits` are [B, T, V],
    the rows at `logit_columns` [B, T] of the output.
    """
    return moving(model, partial(_forward, model, runtime), args, kwargs)


def _forward(model: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    own = type(model).forward
    inputs = dict(arguments(own, model, args, kwargs))
    labels = inputs.pop("labels", None)
    keep = inputs.pop("logits_to_keep", 0)
    names = signature_of(own).parameters
    loss_inputs = {k: v for k, v in inputs.items() if k not in names}
    rows: Rows = "all"
    if labels is None and isinstance(keep, int) and keep == 1:
        rows = "last"
    elif labels is not None and model.training and isinstance(keep, int) and keep == 0:
        rows = "text"
    supervised = supervision(labels, loss_inputs)
    draft = _draft(inputs.get("past_key_values"), keep)
    states = with_tensors_of_base(
        model, lambda: runtime.call(inputs, labels=supervised, rows=rows, draft=draft)
    )
    logits = model.get_output_embeddings()(rows_to_keep(states.hidden, keep))
    family = family_of(model)
    if family.logits is not None:
        logits = family.logits(model, logits)
    loss = None
    if labels is not None:
        vocabulary = model.config.get_text_config().vocab_size
        targets = labels_behind_tokens(labels, inputs.get("attention_mask"), loss_inputs)
        if states.columns is not None:
            targets = gathered_labels(labels, states.columns, loss_inputs)
        loss = model.loss_function(
            logits=logits, vocab_size=vocabulary, **{**loss_inputs, **targets}
        )
        if supervised is not None and model.training and runtime.ratios is not None:
            share = share_of_step(supervised, loss_inputs)
            if isinstance(share, Tensor):
                share = share.to(loss.device)
            loss = loss + share * runtime.ratios.penalty().to(loss.device)
    output = family.output(
        loss=loss,
        logits=logits,
        past_key_values=states.cache,
        hidden_states=states.hidden_states,
        **vision_states(family.output, states.features),
    )
    if states.columns is not None:
        output.logit_columns = states.columns
    if states.extras:
        output.pass_outputs = states.extras
    return output if _wants_dict(model.config, inputs) else output.to_tuple()


def base_forward(base: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Return hidden states of the full length."""
    return moving(base, partial(_base_forward, base, runtime), args, kwargs)


def _base_forward(base: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    model = runtime.model
    inputs = arguments(type(base).forward, base, args, kwargs)
    labels = labels_of_caller(model, runtime)
    states = runtime.call(inputs, labels=labels)
    output_type = family_of(model).base_output
    output = output_type(
        last_hidden_state=states.hidden,
        past_key_values=states.cache,
        hidden_states=states.hidden_states,
        **vision_states(output_type, states.features),
    )
    return output if _wants_dict(model.config, inputs) else output.to_tuple()


def vision_states(output: type, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the fields of an output class that hold features [tokens, D], e.g. `image_hidden_states`."""
    named = {f"{name}_hidden_states": states for name, states in features.items()}
    fields = output.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: states for name, states in named.items() if name in fields}


def rows_to_keep(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """Return the rows of `hidden` [B, L, D] that `logits_to_keep` asks for, as transformers slices them."""
    if isinstance(keep, int):
        return hidden[:, -keep:] if keep else hidden
    if not isinstance(keep, Tensor) or keep.dim() < 2:
        return hidden[:, keep.to(hidden.device) if isinstance(keep, Tensor) else keep]
    keep = keep.to(hidden.device)
    if keep.dtype == torch.bool:
        return hidden[keep]
    return hidden.gather(1, keep[:, :, None].expand(-1, -1, hidden.shape[2]))


def _draft(cache: Any, keep: int | Tensor) -> int:
    """Return the tokens behind the prompt in the first call of assisted decoding."""
    starts = isinstance(cache, HidropCache) and cache.speculative and cache.get_seq_length() == 0
    return keep - 1 if starts and isinstance(keep, int) and keep > 1 else 0


def _wants_dict(config: Any, inputs: dict[str, Any]) -> bool:
    wanted = inputs.get("return_dict")
    if wanted is None:
        wanted = getattr(config, "return_dict", True)
    return bool(wanted)
